"""Lookup of drafts in the prompt, and their verification: what is accepted, and that the distribution stays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.request import Sampling
from expertmesh.attention_server.request import Sequence as EngineSequence
from expertmesh.attention_server.sampler import Sampled, Sampler
from expertmesh.attention_server.verification import Verified, prefixes, verify
from expertmesh.kernels.host_ngram import host_draft


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
    size=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_prompt_lookup_against_a_search(tokens: list[int], shortest: int, more: int, size: int) -> None:
    draft = np.full(size, -1, np.int64)
    found = host_draft(np.array(tokens, np.int64), shortest, shortest + more, draft)
    for length in range(min(shortest + more, len(tokens)), shortest - 1, -1):
        places = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if places:
            extended = list(tokens)
            for index in range(size):
                extended.append(extended[places[-1] + index])
            assert found
            assert draft.tolist() == extended[len(tokens) :]
            return
    assert not found


def test_tokens_are_accepted_up_to_the_first_difference() -> None:
    drafts: list[Draft] = [(4, 5), (), (7, 8, 9)]
    assert prefixes(drafts) == [(), (4,), (4, 5), (), (), (7,), (7, 8), (7, 8, 9)]
    verified = verify(Sampled(np.array([4, 6, 1, 2, 7, 8, 9, 3]), {}), drafts)
    assert verified.sampled.tokens.tolist() == [4, 6, 2, 7, 8, 9, 3]
    assert verified.sampled.counts == (2, 1, 4)
    assert verified.kept.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert verified.last_C.tolist() == [1, 3, 7]


NUM_SEEDS = 10_000
SMALL_VOCAB = 6


@functools.cache
def seeded_sampler() -> Sampler:
    """A sampler whose row r has seed r."""
    sampler = Sampler(SMALL_VOCAB, NUM_SEEDS)
    tokens = np.zeros(9, np.int64)
    for row in range(NUM_SEEDS):
        sampling = Sampling(max_tokens=9, temperature=0.7, seed=row)
        sequence = EngineSequence(link=1, handle=row, request_id="", tokens=tokens, num_prompt=1, sampling=sampling)
        sampler.open(row, sequence)
    return sampler


Verify = Callable[[Sampled, Sequence[Draft]], Verified]


def speculate(
    choose_draft: Callable[[np.ndarray], np.ndarray], accept: Verify = verify
) -> tuple[np.ndarray, np.ndarray, float]:
    """Two tokens of a Markov chain for each of many seeds, the first of them drafted.

    Returns: how often each pair came, what to expect, and the share of drafts that were right.
    """
    logits_VV = torch.from_numpy(np.random.default_rng(5).normal(0, 1.2, (SMALL_VOCAB, SMALL_VOCAB)))
    sampler = seeded_sampler()
    p_VV = torch.softmax(logits_VV / 0.7, -1).numpy()
    rows = np.arange(NUM_SEEDS)
    draft_S = choose_draft(p_VV[0])
    previous = np.stack([np.zeros(NUM_SEEDS, np.int64), draft_S], 1).ravel()
    chosen = sampler.choose(logits_VV[previous].float(), np.repeat(rows, 2), np.tile([0, 1], NUM_SEEDS))
    sampled = accept(chosen, [(token,) for token in draft_S.tolist()]).sampled
    assert sampled.counts is not None
    starts = np.cumsum(sampled.counts) - sampled.counts
    first_S = sampled.tokens[starts]
    is_right = np.array(sampled.counts) == 2
    second_S = np.empty_like(first_S)
    second_S[is_right] = sampled.tokens[starts[is_right] + 1]
    wrong = np.flatnonzero(~is_right)
    later = sampler.choose(logits_VV[first_S[wrong]].float(), wrong, np.ones(len(wrong), np.int64))
    second_S[wrong] = later.tokens
    counts = np.bincount(first_S * SMALL_VOCAB + second_S, minlength=SMALL_VOCAB**2)
    return counts, (p_VV[0][:, None] * p_VV).ravel() * NUM_SEEDS, float(is_right.mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["likeliest", "unlikeliest", "any"])
def test_distribution_of_sampled_output(kind: str) -> None:
    def draft(p_V: np.ndarray) -> np.ndarray:
        if kind == "any":
            return np.random.default_rng(1).integers(0, SMALL_VOCAB, NUM_SEEDS)
        return np.full(NUM_SEEDS, p_V.argmax() if kind == "likeliest" else p_V.argmin())

    counts, expected, rate = speculate(draft)
    assert chisquare(counts, expected).pvalue > 0.01
    assert {"likeliest": rate > 0.3, "unlikeliest": rate < 0.1, "any": 0.1 < rate < 0.25}[kind]


@pytest.mark.slow
def test_chi_square_notices_one_draft_of_fifty_that_is_taken_too_easily() -> None:
    def too_easily(sampled: Sampled, drafts: Sequence[Draft]) -> Verified:
        tokens = sampled.tokens.copy()
        tokens[::100] = [draft[0] for draft in drafts[::50]]
        return verify(Sampled(tokens, {}), drafts)

    counts, expected, _ = speculate(lambda p_V: np.full(NUM_SEEDS, p_V.argmin()), too_easily)
    assert chisquare(counts, expected).pvalue < 1e-6
