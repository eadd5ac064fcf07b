"""A process that renders a checkpoint's chat template for a router: what it computes may be endless, or gigabytes.

Set up with ``{"template": Jinja, "takes_tools": ..., "special_tokens": {...}}`` it answers each question with
``{"text": the prompt}``, or with ``{"field": ..., "problem": ..., "remedy": ...}``. A question has ``messages`` (what
a template is to see of each; the ``arguments`` of their calls still as text), ``tools`` and ``template_kwargs`` (as
text), and ``max_bytes`` of the prompt.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertmesh.mesh.killable_worker import WorkerLimits, serve

LIMITS = WorkerLimits(cpu_s=2.0, memory_bytes=512 * 2**20)

_OURS = frozenset({"messages", "tools", "add_generation_prompt"})
_MAX_PROBLEM_CHARS = 400


class RejectedError(Exception):
    """The conversation makes no prompt."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.answer = {"field": field, "problem": problem, "remedy": remedy}


def new_environment() -> jinja2.Environment:
    """The sandbox of chat templates, with what transformers puts into it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def main() -> None:
    serve(_open, LIMITS)


def _open(setup: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    @functools.cache
    def template() -> jinja2.Template:  # with the first question: Jinja computes what is constant when it compiles
        return new_environment().from_string(setup["template"])

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        try:
            variables = setup["special_tokens"] | _variables(question, takes_tools=setup["takes_tools"])
            return {"text": _render(template, variables, question["max_bytes"])}
        except RejectedError as rejected:
            return rejected.answer

    return answer


def _render(template: Callable[[], jinja2.Template], variables: dict[str, Any], max_bytes: int) -> str:
    pieces, num_bytes = [], 0
    try:
        for piece in template().generate(variables):
            pieces.append(piece)
            num_bytes += len(piece.encode())
            if num_bytes > max_bytes:
                problem = f"the model's chat template makes a prompt of more than {max_bytes} bytes"
                raise RejectedError("chat", problem, "send shorter messages (router.max_prompt_bytes)")
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RuntimeError,
        SyntaxError,
    ) as error:
        problem = f"the model's chat template rejects them ({str(error)[:_MAX_PROBLEM_CHARS]})"
        raise RejectedError("chat.messages", problem, "send roles in its order") from None
    return "".join(pieces)


def _variables(question: dict[str, Any], *, takes_tools: bool) -> dict[str, Any]:
    """What a template may name, beside the special tokens."""
    tools = [_object(f"chat.tools[{index}]", text) for index, text in enumerate(question["tools"])]
    if tools and not takes_tools:
        raise RejectedError("chat.tools", "the model's chat template has no place for tools", "leave them out")
    for index, message in enumerate(question["messages"]):
        for number, call in enumerate(message.get("tool_calls", ())):
            # Templates write arguments out themselves, so they get them as an object.
            field = f"chat.messages[{index}].tool_calls[{number}].arguments"
            call["function"]["arguments"] = _object(field, call["function"]["arguments"] or "{}")
    further = _object("chat.template_kwargs", question["template_kwargs"] or "{}")
    if taken := sorted(_OURS & further.keys()):
        raise RejectedError("chat.template_kwargs", f"sets {', '.join(taken)}", "leave those out: the request has them")
    return further | {"messages": question["messages"], "tools": tools or None, "add_generation_prompt": True}


def _object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RejectedError(field, f"is not JSON ({error})", "send a JSON object") from None
    if not isinstance(value, dict):
        raise RejectedError(field, f"is a {type(value).__name__}", "send a JSON object")
    return value


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Not Jinja's own: that one escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


if __name__ == "__main__":
    main()
