"""From logits to tokens on a GPU.

What needs no more than the logits of a step (greedy, temperature) is part of the captured step and one kernel
(``kernels.sampler``). Options beyond that are applied to the rows of the sequences that ask for them, after the step,
with torch on the device. Draws depend on (seed, position) as on the CPU, but are other draws: Gumbel noise here.

Dimensions: R rows of the table, S sequences to sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.sampler import Feature, Logprobs, Sampler, forbid_ends, keep_likely
from expertmesh.kernels.sampler import gumbel_argmax

_SIMPLE = int(Feature.RANDOM)


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """Log probabilities on the device: of the chosen tokens [S], and the best of each [S, N] with their ids.

    ``index_S``: which of the step's samples they are of; ``count_S``: how many each asked for.
    """

    index_S: list[int]
    count_S: list[int]
    chosen_S: torch.Tensor
    top_SN: torch.Tensor
    top_ids_SN: torch.Tensor

    def fetch(self) -> dict[int, Logprobs]:
        """Waits for the device."""
        chosen, values, ids = self.chosen_S.tolist(), self.top_SN.tolist(), self.top_ids_SN.tolist()
        return {
            index: Logprobs(chosen[i], ids[i][:count], values[i][:count])
            for i, (index, count) in enumerate(zip(self.index_S, self.count_S, strict=True))
        }


class GpuSampler(Sampler):
    """Keeps the options of running sequences by table row, for tokens that are chosen on a device."""

    def __init__(self, vocab_size: int, num_rows: int, device: torch.device) -> None:
        super().__init__(vocab_size, num_rows, device)
        self._device = device

    def temperature(self, rows_S: np.ndarray) -> np.ndarray:
        """float32, 0 = greedy."""
        is_random_S = (self._features_R[rows_S] & Feature.RANDOM).astype(bool)
        return np.where(is_random_S, self._temperature_R[rows_S], np.float32(0))

    def seed(self, rows_S: np.ndarray) -> np.ndarray:
        """int64, the bits of the unsigned seeds."""
        seed_S: np.ndarray = self._seed_R[rows_S].view(np.int64)
        return seed_S

    def special(self, rows_S: np.ndarray) -> np.ndarray:
        """The samples, int64 indices, whose options the captured step does not know."""
        return np.flatnonzero(self._features_R[rows_S] & ~np.uint8(_SIMPLE))

    def choose_special(
        self, logits_SV: torch.Tensor, special: np.ndarray, rows: np.ndarray, position: np.ndarray
    ) -> tuple[torch.Tensor, DeviceLogprobs | None]:
        """Tokens of sequences with any options, int64 on the device, and the log probabilities that they ask for.

        Args:
            logits_SV: of these sequences, float32, overwritten.
            special: which samples of the step they are. rows: their table rows. position: their output tokens.
        """
        features = self._features_R[rows]
        wants = np.flatnonzero(features & Feature.LOGPROBS)
        logprobs_SV = logits_SV[self._there(wants)].log_softmax(-1) if len(wants) else None
        self._forbid(logits_SV, rows, position, features)
        penalised = np.flatnonzero(features & Feature.PENALTY)
        place = self._place_R[rows[penalised]]
        if len(penalised):
            index = self._there(penalised)
            logits_SV.index_copy_(0, index, self._penalties.apply(logits_SV[index], place))
        filtered = np.flatnonzero(features & Feature.FILTER)
        if len(filtered):
            index = self._there(filtered)
            logits_SV.index_copy_(0, index, self._keep_likely(logits_SV[index], rows[filtered]))
        token_S = gumbel_argmax(
            logits_SV,
            self._there(self.temperature(rows)),
            self._there(self.seed(rows)),
            self._there(position),
        )
        if len(penalised):
            self._penalties.accept(place, token_S[self._there(penalised)])
        if logprobs_SV is None:
            return token_S, None
        return token_S, self._device_logprobs(logprobs_SV, token_S, special, wants, rows)

    def _forbid(self, logits_SV: torch.Tensor, rows: np.ndarray, position: np.ndarray, features: np.ndarray) -> None:
        if (features & Feature.CONSTRAINT).any():
            self._constrain(logits_SV, rows, features)
        for index in np.flatnonzero((features & Feature.MIN_TOKENS) & (position < self._min_tokens_R[rows])).tolist():
            row = int(rows[index])
            forbid_ends(logits_SV[index], self._there(self._end_ids[row]), may_have_to=row in self._matchers)
        for index in np.flatnonzero(features & Feature.BIAS).tolist():
            ids, values = self._bias[int(rows[index])]
            logits_SV[index].index_add_(0, self._there(ids), self._there(values))

    def _keep_likely(self, logits_SV: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        temperature_S1 = self._there(self._temperature_R[rows])[:, None]
        weight_SV = (logits_SV - logits_SV.amax(-1, keepdim=True)).div_(temperature_S1).exp_()
        kept_SV = keep_likely(
            weight_SV,
            min_p_S=self._there(self._min_p_R[rows]),
            top_k_S=self._there(self._top_k_R[rows]),
            top_p_S=self._there(self._top_p_R[rows]),
        )
        return logits_SV.where(kept_SV > 0, float("-inf"))

    def _device_logprobs(
        self, logprobs_SV: torch.Tensor, token_S: torch.Tensor, special: np.ndarray, wants: np.ndarray, rows: np.ndarray
    ) -> DeviceLogprobs:
        chosen = logprobs_SV.gather(1, token_S[self._there(wants)][:, None])[:, 0]
        counts = self._num_logprobs_R[rows[wants]].tolist()
        top = logprobs_SV.topk(max(counts))
        return DeviceLogprobs(special[wants].tolist(), counts, chosen, top.values, top.indices)

    def _there(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
