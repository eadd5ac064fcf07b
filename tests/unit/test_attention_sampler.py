"""The sampler against a row-by-row reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.attention_server.request import Sampling, Sequence
from expertmesh.attention_server.sampler import Sampled, Sampler
from expertmesh.attention_server.uniform import uniform
from support.attention import sample

VOCAB = 40


def make_sequence(tokens: list[int], num_prompt: int, **sampling: Any) -> Sequence:
    return Sequence(
        link=1,
        handle=0,
        request_id="r",
        tokens=np.array([*tokens, *[0] * 50]),
        num_prompt=num_prompt,
        num_tokens=len(tokens),
        sampling=Sampling(max_tokens=50, **sampling),
    )


def processed_logits(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    params = sequence.sampling
    logits = np.array(logits, np.float64)
    if sequence.num_output < params.min_tokens:
        logits[list(params.end_ids)] = -np.inf
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    tokens = sequence.tokens[: sequence.num_tokens].tolist()
    output = tokens[sequence.num_prompt :]
    for token in set(tokens):
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return logits


def reference_distribution(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Probabilities in vLLM's order: temperature, min_p, top_k, top_p."""
    params = sequence.sampling
    logits = processed_logits(logits, sequence)
    if params.temperature == 0:
        return np.array(np.arange(len(logits)) == logits.argmax(), np.float64)
    scaled = logits / params.temperature
    weights: np.ndarray = np.exp(scaled - scaled.max())
    weights[weights < params.min_p] = 0
    if params.top_k:
        weights[weights < np.sort(weights)[-params.top_k]] = 0
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= params.top_p]] = 0
    weights /= weights.sum()
    return weights


def reference_token(logits: np.ndarray, sequence: Sequence) -> int:
    """The draw in the order of token ids."""
    return int(np.searchsorted(np.cumsum(reference_distribution(logits, sequence)), number_of(sequence), side="right"))


def number_of(sequence: Sequence) -> float:
    seed = np.array([sequence.sampling.seed & (2**64 - 1)], np.uint64)
    return float(uniform(seed, np.array([sequence.num_output]))[0])


def sample_once(logits: np.ndarray, sequences: list[Sequence]) -> Sampled:
    sampler = Sampler(VOCAB, len(sequences))
    for row, sequence in enumerate(sequences):
        sampler.open(row, sequence)
    positions = np.array([sequence.num_output for sequence in sequences])
    return sample(sampler, torch.tensor(logits, dtype=torch.float32), np.arange(len(sequences)), positions)


options: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "top_k": st.sampled_from([0, 1, 3, 17, VOCAB, 1000]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 3, 30]),
        "end_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 2.0, 5.0]), max_size=3),
    }
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_each_row_gets_what_the_reference_gives_it(data: st.DataObject) -> None:
    rows = data.draw(st.lists(options, min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sequences = []
    for row in rows:
        row["top_k"] = min(row["top_k"], VOCAB)
        tokens = rng.integers(0, VOCAB, 12).tolist()
        sequences.append(make_sequence(tokens, data.draw(st.integers(1, 12)), **row))
    logits = rng.normal(0, 3, (len(rows), VOCAB)).astype(np.float32)
    sampled = sample_once(logits, sequences)
    for index, sequence in enumerate(sequences):
        expected = reference_token(logits[index], sequence)
        if sampled.tokens[index] == expected:
            continue
        # A uniform number within rounding of the border between two tokens may fall on either side.
        borders = np.cumsum(reference_distribution(logits[index], sequence))
        assert sequence.sampling.temperature > 0
        assert np.abs(borders - number_of(sequence)).min() < 1e-5


def test_tokens_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (6, VOCAB))
    sequences = [
        make_sequence([1, 2], 1, temperature=1.0, seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(6)
    ]
    together = sample_once(logits, sequences).tokens.tolist()
    alone = [sample_once(logits[i : i + 1], [sequence]).tokens[0] for i, sequence in enumerate(sequences)]
    assert together == alone


def test_uniform_numbers_are_uniform_and_independent_of_neighbours() -> None:
    seeds, positions = np.divmod(np.arange(200_000, dtype=np.int64), 1000)
    numbers = uniform(seeds.astype(np.uint64), positions)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert np.abs(counts / 4000 - 1).max() < 0.08
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers[:-1000], numbers[1000:])[0, 1]) < 0.01
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.slow
def test_draws_follow_the_distribution() -> None:
    logits = np.random.default_rng(1).normal(0, 1, VOCAB)
    sequences = [make_sequence([1], 1, temperature=0.8, top_k=10, seed=seed) for seed in range(4000)]
    tokens = sample_once(np.tile(logits, (4000, 1)), sequences).tokens
    frequencies = np.bincount(tokens, minlength=VOCAB) / 4000
    assert np.abs(frequencies - reference_distribution(logits, sequences[0])).max() < 0.03


def test_penalties_are_counted_as_tokens_come() -> None:
    sequence = make_sequence([3], 1, presence_penalty=2.0, frequency_penalty=0.5, repetition_penalty=1.1)
    sampler = Sampler(VOCAB, 2)
    sampler.open(1, sequence)
    rng = np.random.default_rng(2)
    for position in range(20):
        logits = rng.normal(0, 1, (1, VOCAB)).astype(np.float32)
        expected = int(processed_logits(logits[0], sequence).argmax())
        token = int(sample(sampler, torch.tensor(logits), np.array([1]), np.array([position])).tokens[0])
        assert token == expected
        sequence.tokens[sequence.num_tokens] = token
        sequence.num_tokens += 1
    sampler.close(1)
    fresh = make_sequence([3], 1, presence_penalty=2.0)
    sampler.open(1, fresh)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, sequence.tokens[1]] = 0.1
    assert sample(sampler, torch.tensor(logits), np.array([1]), np.array([0])).tokens[0] == sequence.tokens[1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = np.random.default_rng(3).normal(0, 2, (3, VOCAB)).astype(np.float32)
    sequences = [
        make_sequence([1], 1),
        make_sequence([1], 1, logprobs=3, logit_bias={5: 100.0}),
        make_sequence([1], 1, logprobs=0, temperature=1.0, seed=4),
    ]
    sampled = sample_once(logits, sequences)
    raw = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert sorted(sampled.logprobs) == [1, 2]
    first = sampled.logprobs[1]
    assert sampled.tokens[1] == 5
    assert first.chosen == pytest.approx(raw[1, 5], abs=1e-5)
    assert first.top_ids == np.argsort(-raw[1])[:3].tolist()
    assert first.top_values == pytest.approx(np.sort(raw[1])[::-1][:3].tolist(), abs=1e-5)
    assert sampled.logprobs[2].top_ids == []


def test_tiny_temperature_is_finite() -> None:
    logits = np.random.default_rng(4).normal(0, 50, (1, VOCAB))
    sampled = sample_once(logits, [make_sequence([1], 1, temperature=1e-30, top_p=0.5)])
    assert sampled.tokens[0] == logits[0].argmax()
