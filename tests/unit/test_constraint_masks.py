"""What constraints allow, against languages that are enumerated; and what masks do to logits."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.attention_server.constraint import ConstraintCompiler, Matcher, TokenMasks
from expertmesh.attention_server.request import RefusedError, Sampling, Sequence
from expertmesh.attention_server.sampler import Sampler
from expertmesh.mesh.constraint import Constraint
from support.attention import sample
from support.small_tokens import EOS, SECOND_EOS, TOKENS, write_tokenizer

VOCAB = 64  # more than the tokenizer has: the rest is never allowed
ENDS = [EOS, SECOND_EOS]

Language = tuple[str, frozenset[str]]
"""A regular expression, and all strings that match it."""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> ConstraintCompiler:
    return ConstraintCompiler(write_tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer.json"), VOCAB, ENDS)


def matcher_of(compiler: ConstraintCompiler, kind: str, source: str, *, ignore_eos: bool = False) -> Matcher:
    return compiler.matcher(Constraint(kind, source), [], ignore_eos=ignore_eos)


def allowed_ids(matcher: Matcher) -> set[int]:
    logits = torch.zeros(1, VOCAB)
    TokenMasks(VOCAB).apply(logits, [(0, matcher)])
    assert not matcher.problem
    return set(torch.nonzero(logits[0] == 0).flatten().tolist())


def expected_ids(language: frozenset[str], prefix: str) -> set[int]:
    """Tokens after which some string of the language can still be reached, and the ends where one is."""
    texts = enumerate(TOKENS)
    going_on = {
        number
        for number, text in texts
        if number not in ENDS and any(word.startswith(prefix + text) for word in language)
    }
    return going_on | (set(ENDS) if prefix in language else set())


def alternatives(parts: list[Language]) -> Language:
    return "(" + "|".join(source for source, _ in parts) + ")", frozenset().union(*(words for _, words in parts))


def joined(parts: list[Language]) -> Language:
    words = itertools.product(*(words for _, words in parts))
    return "".join(source for source, _ in parts), frozenset("".join(chosen) for chosen in words)


def optional(part: Language) -> Language:
    return f"({part[0]})?", part[1] | {""}


LITERALS = st.text("abc0:", min_size=1, max_size=3).map(lambda text: (re.escape(text), frozenset({text})))
LANGUAGES = st.recursive(
    LITERALS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(alternatives),
        st.lists(inner, min_size=2, max_size=2).map(joined),
        inner.map(optional),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(language=LANGUAGES, seed=st.integers(0, 2**32))
def test_a_regex_allows_what_the_enumerated_language_does(
    compiler: ConstraintCompiler, language: Language, seed: int
) -> None:
    source, words = language
    matcher = matcher_of(compiler, "regex", source)
    chooser, prefix = random.Random(seed), ""
    while True:
        found = allowed_ids(matcher)
        assert found == expected_ids(words, prefix), (source, prefix)
        going_on = sorted(found - set(ENDS))
        assert matcher.must_end == (not going_on) or not prefix
        if not going_on:
            break
        token = chooser.choice(going_on)
        matcher.accept(token)
        prefix += TOKENS[token]
    assert prefix in words
    assert re.fullmatch(source, prefix)


@settings(max_examples=50, deadline=None)
@given(words=st.sets(st.text('ab"\\:{ ', min_size=1, max_size=4), min_size=1, max_size=5))
def test_choices_are_taken_as_they_are(compiler: ConstraintCompiler, words: set[str]) -> None:
    matcher = matcher_of(compiler, "choice", json.dumps(sorted(words)))
    assert allowed_ids(matcher) == expected_ids(frozenset(words), "")
    for word in words:
        reached = matcher
        for position, character in enumerate(word):
            reached = reached.after([TOKENS.index(character)])
            assert allowed_ids(reached) == expected_ids(frozenset(words), word[: position + 1])


def test_a_replayed_output_is_followed_to_the_same_place(compiler: ConstraintCompiler) -> None:
    constraint = Constraint("json_schema", json.dumps({"type": "object", "properties": {"a": {"enum": [0, "b"]}}}))
    matcher = compiler.matcher(constraint, [], ignore_eos=False)
    chooser, output = random.Random(3), list[int]()
    while not matcher.must_end and len(output) < 60:
        assert allowed_ids(compiler.matcher(constraint, output, ignore_eos=False)) == allowed_ids(matcher)
        output.append(chooser.choice(sorted(allowed_ids(matcher) - set(ENDS))))
        matcher.accept(output[-1])
    assert len(output) > 3
    with pytest.raises(RefusedError, match="output_token_ids do not fit") as refused:
        compiler.matcher(constraint, [TOKENS.index("a")], ignore_eos=False)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_draft_is_followed_without_moving_the_sequence(compiler: ConstraintCompiler) -> None:
    matcher = matcher_of(compiler, "regex", "abc|a0")
    drafted = [matcher.after([TOKENS.index("a")]), matcher.after([TOKENS.index("ab")])]
    assert allowed_ids(drafted[0]) == {TOKENS.index("b"), TOKENS.index("bc"), TOKENS.index("0")}
    assert allowed_ids(drafted[1]) == {TOKENS.index("c")}
    assert allowed_ids(matcher) == {TOKENS.index("a"), TOKENS.index("ab"), TOKENS.index("abc")}
    assert matcher.after([TOKENS.index("b")]).problem, "a draft that does not fit says so"


def test_who_ignores_the_end_ends_only_where_nothing_else_is_left(compiler: ConstraintCompiler) -> None:
    matcher = matcher_of(compiler, "regex", "a(b(0|))?", ignore_eos=True)
    matcher.accept(TOKENS.index("a"))
    assert allowed_ids(matcher) == {TOKENS.index("b")}
    matcher.accept(TOKENS.index("b"))
    assert allowed_ids(matcher) == {TOKENS.index("0")}
    assert allowed_ids(matcher_of(compiler, "regex", "", ignore_eos=True)) == set(ENDS)


def test_rows_of_others_stay_as_they_are(compiler: ConstraintCompiler) -> None:
    matchers = [matcher_of(compiler, "regex", source) for source in ("a+", "[0-9]{2}", "(b|c)0")]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    masked = logits.clone()
    rows = [4, 0, 3]
    TokenMasks(VOCAB).apply(masked, list(zip(rows, matchers, strict=True)))
    assert torch.equal(masked[[1, 2, 5]], logits[[1, 2, 5]])
    for row, matcher in zip(rows, matchers, strict=True):
        allowed = allowed_ids(matcher)
        assert set(torch.nonzero(masked[row].isfinite()).flatten().tolist()) == allowed
        assert torch.equal(masked[row][sorted(allowed)], logits[row][sorted(allowed)])


def constrained_sequence(matcher: Matcher | None, **sampling: Any) -> Sequence:
    return Sequence(
        link=1,
        handle=0,
        request_id="r",
        tokens=np.zeros(50, np.int64),
        num_prompt=1,
        num_tokens=1,
        sampling=Sampling(max_tokens=49, **sampling),
        matcher=matcher,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 5.0, "seed": 9},
        {"temperature": 1.0, "top_p": 0.01, "seed": 1},
        {"temperature": 1.0, "top_k": 1, "min_p": 0.9},
        {"logit_bias": {TOKENS.index("z"): 100.0}},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"min_tokens": 9, "end_ids": frozenset(ENDS)},
        {"logprobs": 3},
    ],
)
def test_no_option_gets_around_a_mask(compiler: ConstraintCompiler, options: dict[str, Any]) -> None:
    """The most likely token by far is one that the constraint forbids; an unconstrained sequence beside it gets it."""
    sampler = Sampler(VOCAB, 4)
    matcher = matcher_of(compiler, "regex", "(ab|c0){2}")
    sampler.open(2, constrained_sequence(matcher, **options))
    sampler.open(1, constrained_sequence(None))
    text = ""
    for position in range(20):
        logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(position))
        logits[:, TOKENS.index("z")] = 50.0
        unmasked = logits[1].log_softmax(-1)
        sampled = sample(sampler, logits, np.array([1, 2]), np.array([position, position]))
        plain, token = sampled.tokens.tolist()
        assert plain == TOKENS.index("z")
        if "logprobs" in options:
            assert sampled.logprobs[1].chosen == pytest.approx(float(unmasked[token]), abs=1e-4)
            assert sampled.logprobs[1].top_ids[0] == TOKENS.index("z"), "they are those before constraints and filters"
        if token in ENDS:
            break
        text += TOKENS[token]
        matcher.accept(token)
        if matcher.must_end:
            break
    assert re.fullmatch("(ab|c0){2}", text)
    sampler.close(2)


def test_fewer_tokens_than_asked_for_where_the_constraint_ends(compiler: ConstraintCompiler) -> None:
    """``min_tokens`` keeps an end away while something else is allowed, and no longer."""
    sampler = Sampler(VOCAB, 1)
    matcher = matcher_of(compiler, "regex", "a?")
    sampler.open(0, constrained_sequence(matcher, min_tokens=5, end_ids=frozenset(ENDS)))
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 10.0
    assert sample(sampler, logits.clone(), np.array([0]), np.array([0])).tokens.tolist() == [TOKENS.index("a")]
    empty = matcher_of(compiler, "regex", "")
    sampler.close(0)
    sampler.open(0, constrained_sequence(empty, min_tokens=5, end_ids=frozenset(ENDS)))
    assert sample(sampler, logits.clone(), np.array([0]), np.array([0])).tokens.tolist() == [EOS]


def test_what_cannot_be_followed_is_said(compiler: ConstraintCompiler) -> None:
    """Its row is left alone: the engine ends the sequence with the problem."""
    matcher = matcher_of(compiler, "regex", "[a-c]{3}")
    matcher.accept(TOKENS.index("a"))
    assert not matcher.problem
    matcher.accept(TOKENS.index("z"))
    assert matcher.problem.startswith("sampling_params.regex: cannot be followed beyond 1 output tokens")
    logits = torch.zeros(1, VOCAB)
    TokenMasks(VOCAB).apply(logits, [(0, matcher)])
    assert torch.equal(logits, torch.zeros(1, VOCAB))


def test_a_model_without_the_means_is_named(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{", encoding="utf-8")
    for file, vocab_size, ends in (
        (path, VOCAB, []),
        (tmp_path / "none", VOCAB, ENDS),
        (damaged, VOCAB, ENDS),
        (path, 9, ENDS),
    ):
        with pytest.raises(RefusedError, match="cannot be constrained") as refused:
            ConstraintCompiler(file, vocab_size, ends).matcher(Constraint("regex", "a"), [], ignore_eos=False)
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
