"""From logits to tokens, for all sequences of a step at once.

Order, as vLLM's: log probabilities of the raw logits; constraints; minimum length; logit bias; penalties; then greedy,
or temperature, min_p, top_k, top_p and a draw. Work for an option is done only when a sequence of the batch uses it.

Dimensions: R rows of the table, S sequences to sample, V vocabulary.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.constraint import Matcher, TokenMasks
from expertmesh.attention_server.penalties import PenaltyState
from expertmesh.attention_server.request import Sampling, Sequence
from expertmesh.attention_server.uniform import uniform


class Feature(enum.IntFlag):
    """What a sequence asks of the sampler."""

    RANDOM = 1
    FILTER = 2  # top_k, top_p or min_p
    PENALTY = 4
    BIAS = 8
    MIN_TOKENS = 16
    LOGPROBS = 32
    CONSTRAINT = 64


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probability of the chosen token and the most likely tokens with theirs, best first."""

    chosen: float
    top_ids: list[int]
    top_values: list[float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """``tokens`` int64 [S]; ``logprobs`` by index into them, for the sequences that asked.

    ``counts``: how many of the tokens, in order, each sequence has; None = one.
    """

    tokens: np.ndarray
    logprobs: dict[int, Logprobs]
    counts: tuple[int, ...] | None = None


def no_samples() -> Sampled:
    return Sampled(np.empty(0, np.int64), {})


class Sampler:
    """Keeps the options of running sequences by table row."""

    def __init__(self, vocab_size: int, num_rows: int, device: torch.device | None = None) -> None:
        """``device``: where logits are and penalties are kept; None = the CPU."""
        self._features_R = np.zeros(num_rows, np.uint8)
        self._seed_R = np.zeros(num_rows, np.uint64)
        self._temperature_R = np.ones(num_rows, np.float32)
        self._top_p_R = np.ones(num_rows, np.float64)
        self._top_k_R = np.full(num_rows, vocab_size, np.int64)
        self._min_p_R = np.zeros(num_rows, np.float32)
        self._min_tokens_R = np.zeros(num_rows, np.int64)
        self._num_logprobs_R = np.zeros(num_rows, np.int64)
        self._place_R = np.zeros(num_rows, np.int64)
        self._end_ids: dict[int, np.ndarray] = {}
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._penalties = PenaltyState(vocab_size, device)
        self._matchers: dict[int, Matcher] = {}
        self._masks = TokenMasks(vocab_size, device)
        self._vocab_size = vocab_size

    def open(self, row: int, sequence: Sequence) -> None:
        """A sequence starts to run in a row."""
        params = sequence.sampling
        features = _features(params)
        if sequence.matcher is not None:
            features |= Feature.CONSTRAINT
            self._matchers[row] = sequence.matcher
        self._features_R[row] = features
        self._seed_R[row] = np.uint64(params.seed & 0xFFFFFFFFFFFFFFFF)
        self._temperature_R[row] = params.temperature
        self._top_p_R[row] = params.top_p
        self._top_k_R[row] = min(params.top_k, self._vocab_size) or self._vocab_size
        self._min_p_R[row] = params.min_p
        self._min_tokens_R[row] = params.min_tokens
        self._num_logprobs_R[row] = min(params.logprobs or 0, self._vocab_size)
        if features & Feature.MIN_TOKENS:
            in_vocabulary = sorted(token for token in params.end_ids if token < self._vocab_size)
            self._end_ids[row] = np.array(in_vocabulary, np.int64)
        if features & Feature.BIAS:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self._bias[row] = (np.array(ids, np.int64), np.array(values, np.float32))
        if features & Feature.PENALTY:
            self._place_R[row] = self._penalties.open(sequence)

    def close(self, row: int) -> None:
        """The sequence of a row stopped running."""
        self._end_ids.pop(row, None)
        self._bias.pop(row, None)
        self._matchers.pop(row, None)
        if self._features_R[row] & Feature.PENALTY:
            self._penalties.close(int(self._place_R[row]))
        self._features_R[row] = 0

    def accept(self, rows_S: np.ndarray, tokens_S: np.ndarray) -> None:
        """Count new output tokens, each of the sequence in its table row, for the penalties to come."""
        penalised = np.flatnonzero(self._features_R[rows_S] & Feature.PENALTY)
        if len(penalised):
            self._penalties.accept(self._place_R[rows_S[penalised]], torch.from_numpy(tokens_S[penalised]))

    def choose(
        self,
        logits_SV: torch.Tensor,
        rows_S: np.ndarray,
        position_S: np.ndarray,
        drafted_S: List[tuple[int, ...]] | None = None,
    ) -> Sampled:
        """Choose the token that follows each of some rows, as a pure function of what was accepted before.

        Args:
            logits_SV: float32, overwritten.
            rows_S: int64, the sequences' table rows; one may come several times.
            position_S: int64, the number of output tokens before each.
            drafted_S: those of them that are only drafted; None = none.
        """
        features_S = self._features_R[rows_S]
        used = int(np.bitwise_or.reduce(features_S))
        if not used:
            return Sampled(logits_SV.argmax(-1).numpy(), {})
        wants_logprobs = np.flatnonzero(features_S & Feature.LOGPROBS)
        logprobs_SV = logits_SV[torch.from_numpy(wants_logprobs)].log_softmax(-1) if len(wants_logprobs) else None
        if used & Feature.CONSTRAINT:
            self._constrain(logits_SV, rows_S, features_S, drafted_S)
        if used & Feature.MIN_TOKENS:
            self._forbid_ends(logits_SV, rows_S, position_S, features_S)
        if used & Feature.BIAS:
            self._add_bias(logits_SV, rows_S, features_S)
        penalised = np.flatnonzero(features_S & Feature.PENALTY)
        if len(penalised):
            index, place = torch.from_numpy(penalised), self._place_R[rows_S[penalised]]
            drafted = None if drafted_S is None else _pairs([drafted_S[index] for index in penalised.tolist()])
            logits_SV.index_copy_(0, index, self._penalties.apply(logits_SV[index], place, drafted))
        tokens_S = self._choose(logits_SV, rows_S, position_S, features_S)
        if logprobs_SV is None:
            return Sampled(tokens_S, {})
        return Sampled(tokens_S, self._report(logprobs_SV, wants_logprobs, rows_S, tokens_S))

    def _constrain(
        self,
        logits_SV: torch.Tensor,
        rows_S: np.ndarray,
        features_S: np.ndarray,
        drafted_S: List[tuple[int, ...]] | None = None,
    ) -> None:
        constrained: list[tuple[int, Matcher]] = []
        for index in np.flatnonzero(features_S & Feature.CONSTRAINT).tolist():
            matcher = self._matchers[int(rows_S[index])]
            drafted = () if drafted_S is None else drafted_S[index]
            constrained.append((index, matcher.after(drafted) if drafted else matcher))
        self._masks.apply(logits_SV, constrained)

    def _forbid_ends(
        self, logits_SV: torch.Tensor, rows_S: np.ndarray, position_S: np.ndarray, features_S: np.ndarray
    ) -> None:
        wants = (features_S & Feature.MIN_TOKENS).astype(bool) & (position_S < self._min_tokens_R[rows_S])
        for index in np.flatnonzero(wants).tolist():
            row = int(rows_S[index])
            forbid_ends(logits_SV[index], torch.from_numpy(self._end_ids[row]), may_have_to=row in self._matchers)

    def _add_bias(self, logits_SV: torch.Tensor, rows_S: np.ndarray, features_S: np.ndarray) -> None:
        for index in np.flatnonzero(features_S & Feature.BIAS).tolist():
            ids, values = self._bias[int(rows_S[index])]
            logits_SV[index].index_add_(0, torch.from_numpy(ids), torch.from_numpy(values))

    def _choose(
        self, logits_SV: torch.Tensor, rows_S: np.ndarray, position_S: np.ndarray, features_S: np.ndarray
    ) -> np.ndarray:
        random = np.flatnonzero(features_S & Feature.RANDOM)
        if len(random) == len(rows_S):
            return self._draw(logits_SV, rows_S, position_S)
        tokens_S = logits_SV.argmax(-1).numpy()
        if len(random):
            tokens_S[random] = self._draw(logits_SV[torch.from_numpy(random)], rows_S[random], position_S[random])
        return tokens_S

    def _draw(self, logits_SV: torch.Tensor, rows_S: np.ndarray, position_S: np.ndarray) -> np.ndarray:
        """Inverse transform sampling in the order of token ids, one uniform number for each sequence."""
        temperature_S1 = torch.from_numpy(self._temperature_R[rows_S])[:, None]
        # The maximum goes first: no temperature, however small, can then overflow.
        weight_SV = (logits_SV - logits_SV.amax(-1, keepdim=True)).div_(temperature_S1).exp_()
        filtered = np.flatnonzero(self._features_R[rows_S] & Feature.FILTER)
        if len(filtered):
            index, rows = torch.from_numpy(filtered), rows_S[filtered]
            kept = keep_likely(
                weight_SV[index],
                min_p_S=torch.from_numpy(self._min_p_R[rows]),
                top_k_S=torch.from_numpy(self._top_k_R[rows]),
                top_p_S=torch.from_numpy(self._top_p_R[rows]),
            )
            weight_SV.index_copy_(0, index, kept)
        cumulated_SV = weight_SV.cumsum(-1, dtype=torch.float64)
        u_S1 = torch.from_numpy(uniform(self._seed_R[rows_S], position_S))[:, None]
        return torch.searchsorted(cumulated_SV, u_S1 * cumulated_SV[:, -1:], right=True)[:, 0].numpy()

    def _report(
        self, logprobs_SV: torch.Tensor, wants_logprobs: np.ndarray, rows_S: np.ndarray, tokens_S: np.ndarray
    ) -> dict[int, Logprobs]:
        chosen = logprobs_SV.gather(1, torch.from_numpy(tokens_S[wants_logprobs])[:, None])[:, 0].tolist()
        counts = self._num_logprobs_R[rows_S[wants_logprobs]].tolist()
        values, ids = (top.tolist() for top in logprobs_SV.topk(max(counts)))
        return {
            index: Logprobs(chosen[i], ids[i][: counts[i]], values[i][: counts[i]])
            for i, index in enumerate(wants_logprobs.tolist())
        }


def keep_likely(
    weight_SV: torch.Tensor, *, min_p_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor
) -> torch.Tensor:
    """Zero the weights that min_p, then top_k, then top_p leave out. Ties with the last kept weight are kept.

    Args:
        weight_SV: float32, unnormalised probabilities whose largest is 1. top_k_S: 1 .. V. top_p_S: in (0, 1].
    """
    # Ascending, as numpy sorts: with SIMD, some 30 times as fast as torch on the CPU.
    sorted_SV = torch.from_numpy(np.sort(weight_SV.numpy(), axis=-1)) if weight_SV.is_cpu else weight_SV.sort(-1).values
    num_weights = sorted_SV.shape[1]
    floor_S1 = torch.maximum(sorted_SV.gather(1, num_weights - top_k_S[:, None]), min_p_S[:, None])
    # Weights of 0 stay 0, so a floor above them costs nothing and lets top_p = 1 keep exactly the others.
    floor_S1.clamp_(min=torch.finfo(torch.float32).tiny)
    kept_SV = sorted_SV.where(sorted_SV >= floor_S1, 0.0)
    cumulated_SV = kept_SV.cumsum(-1, dtype=torch.float64)
    # A token leaves when those before it, the larger ones, reach top_p.
    total_S1 = cumulated_SV[:, -1:]
    num_left_S1 = (cumulated_SV <= total_S1 - top_p_S[:, None] * total_S1).sum(-1, keepdim=True)
    floor_S1 = torch.maximum(floor_S1, sorted_SV.gather(1, num_left_S1.clamp_(max=num_weights - 1)))
    return weight_SV.where(weight_SV >= floor_S1, 0.0)


def _pairs(drafted_S: List[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Every token with the number of its row."""
    row_N = np.repeat(np.arange(len(drafted_S)), [len(drafted) for drafted in drafted_S])
    return row_N, np.array([token for drafted in drafted_S for token in drafted], np.int64)


def forbid_ends(logits_V: torch.Tensor, end_ids: torch.Tensor, *, may_have_to: bool) -> None:
    """Set the logits of end tokens to −inf, in place; ``may_have_to``: not where nothing else would be left."""
    if may_have_to and not logits_V.index_fill(0, end_ids, float("-inf")).isfinite().any():
        return
    logits_V.index_fill_(0, end_ids, float("-inf"))


def _features(params: Sampling) -> Feature:
    features = Feature(0)
    if params.temperature > 0:
        features |= Feature.RANDOM
        if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0:
            features |= Feature.FILTER
    if params.has_penalties:
        features |= Feature.PENALTY
    if params.logit_bias:
        features |= Feature.BIAS
    if params.min_tokens and params.end_ids:
        features |= Feature.MIN_TOKENS
    if params.logprobs is not None:
        features |= Feature.LOGPROBS
    return features
