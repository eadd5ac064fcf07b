"""What an output has to be: constraints of a request as llguidance reads them, and what they may cost.

A router compiles a constraint in a process that may die of it (``mesh.constraint_worker``) before others see it; an
attention server compiles what a router let through, under the same limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from expertmesh.v1 import generate_pb2

MAX_SOURCE_BYTES = 64 * 2**10
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 1024

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,  # some 10 ms
    step_lexer_fuel=50_000,  # some 4 ms of a step that all sequences wait for
    step_max_items=4_000,  # some 20 ms of it, at the worst
    max_items_in_row=1_000,
    max_lexer_states=10_000,  # 1-2 kB each, of one sequence
    max_grammar_size=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)

_DIRECTIVE = "%llguidance"
_OPTIONS = _DIRECTIVE + ' {"no_forcing": true}'
"""Text that a grammar leaves no choice about is not computed ahead: there may be gigabytes of it, and no limit counts
them. So a mask holds every token that the output can go on with, not only the usual tokens of such text."""

# White space without end is JSON too, and small models like it. A schema's own "x-guidance" goes before this.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}
_MAX_MESSAGE_CHARS = 400
_POSITION = re.compile(r"^(?:at )?(\d+)\((\d+)\): (?:failed to compile JSON schema: )?")
_REGEX_ERROR = re.compile(r"regex parse error:\n {4}(?P<regex>.*)\n {4}(?P<indent> *)\^+.*\nerror: (?P<reason>.*)")
_UNIMPLEMENTED = re.compile(r"^Unimplemented keys: (\[.*\])")


class ConstraintError(ValueError):
    """The constraint cannot be compiled, or no output fits it; the message says where and why."""


class VocabularyError(ValueError):
    """The model's tokenizer cannot be used to constrain its output; the message says why."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """One kind of the request's ``constraint``; ``source`` is its text, of choices the JSON list."""

    kind: str
    source: str

    @property
    def field(self) -> str:
        return f"sampling_params.{self.kind}"


def constraint_of(params: generate_pb2.SamplingParams) -> Constraint | None:
    """The constraint that a request asks for; nothing of it is compiled or checked."""
    match params.WhichOneof("constraint"):
        case "json_schema":
            return Constraint("json_schema", params.json_schema)
        case "regex":
            return Constraint("regex", params.regex)
        case "grammar":
            return Constraint("grammar", params.grammar)
        case "json_object" if params.json_object:
            return Constraint("json_object", '{"type": "object"}')
        case "choice":
            return Constraint("choice", json.dumps(list(params.choice.choices)))
    return None


def open_vocabulary(tokenizer_json: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokens of a model as bytes; takes a fraction of a second.

    Args:
        vocab_size: of the model's logits; those beyond the tokenizer's are never allowed.

    Raises:
        VocabularyError: the tokenizer is missing or of an unknown kind, or no token ends an output.
    """
    if not eos_token_ids:
        raise VocabularyError("the model has no end-of-sequence token")
    try:
        return LLTokenizer(tokenizer_json.read_text(encoding="utf-8"), vocab_size, list(eos_token_ids))
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{tokenizer_json} cannot be used ({_short(str(error))})") from None


def compile_constraint(vocabulary: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """A matcher before the first token. Hostile sources may take any time and memory.

    Raises:
        ConstraintError: it is not valid, too complex, or no output fits it.
    """
    try:
        grammar = _grammar(constraint)
    except RecursionError:
        raise ConstraintError("nested too deeply") from None
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some sources fail here only
    if matcher.is_error():
        raise ConstraintError(_explain(matcher.get_error(), constraint))
    return matcher


def _grammar(constraint: Constraint) -> str:
    """llguidance's own form of a constraint: always a Lark grammar, because only that can have options."""
    return LLMatcher.grammar_from_lark(_OPTIONS + "\n" + _lark(constraint))


def _lark(constraint: Constraint) -> str:
    match constraint.kind:
        case "regex":
            return f"start: /{regex_to_lark(constraint.source, use_ascii='')}/"
        case "choice":
            # Lark's strings are written as JSON's.
            quoted = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(constraint.source)]
            return "start: " + " | ".join(quoted)
        case "grammar":
            if _DIRECTIVE in constraint.source:
                raise ConstraintError(f"{_DIRECTIVE} may not be set by requests")
            return constraint.source
    schema = _parse_schema(constraint.source)
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": _JSON_OPTIONS | schema.get("x-guidance", {})}
    return f"start: %json {json.dumps(schema)}"


def _parse_schema(source: str) -> dict[str, Any] | bool:
    try:
        schema = json.loads(source)
    except json.JSONDecodeError as error:
        raise ConstraintError(f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    if not isinstance(schema, dict | bool):
        raise ConstraintError("line 1, column 1: a JSON schema is an object, or true")
    if isinstance(schema, dict) and not isinstance(schema.get("x-guidance", {}), dict):
        raise ConstraintError("#/x-guidance: is an object")
    return schema


def _explain(message: str, constraint: Constraint) -> str:
    """llguidance's message in the words of the source that the client sent, with the position in front."""
    if message.startswith("NoExtension"):
        return "no output fits it"
    found = _POSITION.match(message)
    reason = message[found.end() :] if found is not None else message
    if constraint.kind == "regex":
        at = _REGEX_ERROR.search(message)
        return _short(f"character {len(at['indent']) + 1}: {at['reason']}" if at is not None else reason)
    unimplemented = _UNIMPLEMENTED.match(reason)
    if unimplemented is not None and constraint.kind == "json_schema":
        keys = json.loads(unimplemented[1])
        places = sorted(set(_places(json.loads(constraint.source), set(keys))))
        return _short(f"{', '.join(places) or '#'}: {', '.join(keys)} is not supported")
    if found is not None and constraint.kind == "grammar":
        reason = f"line {int(found[1]) - 1}, column {found[2]}: {reason}"  # the first line is ours
    return _short(reason)


def _places(schema: object, keys: set[str], place: str = "#") -> Iterator[str]:
    """JSON pointers of the keys, wherever they stand."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in keys:
                yield f"{place}/{key}"
            yield from _places(value, keys, f"{place}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from _places(value, keys, f"{place}/{index}")


def _short(message: str) -> str:
    line = message.strip().split("\n", 1)[0]
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[:_MAX_MESSAGE_CHARS] + " ..."
