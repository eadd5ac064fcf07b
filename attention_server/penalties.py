"""Which tokens a sequence has seen, for the sequences that ask for penalties.

Dimensions: S sequences of a call, P places, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from expertmesh.attention_server.request import Sequence


class PenaltyState:
    """A place for each running sequence with penalties; grows by doubling and is updated token by token."""

    def __init__(self, vocab_size: int, device: torch.device | None = None) -> None:
        """``device``: where the state and the logits are; None = the CPU."""
        self._device = device
        self._seen_PV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)  # in the prompt or the output
        self._count_PV = torch.zeros(0, vocab_size, device=device)  # in the output
        self._strength_P3 = torch.zeros(0, 3, device=device)  # repetition, frequency, presence
        self._free: list[int] = []

    def open(self, sequence: Sequence) -> int:
        """Give the sequence a place and count the tokens that it has."""
        if not self._free:
            self._grow()
        place = self._free.pop()
        tokens = self._to_device(sequence.tokens[: sequence.num_tokens])
        output = tokens[sequence.num_prompt :]
        self._seen_PV[place].zero_()[tokens] = True
        self._count_PV[place].zero_().index_add_(0, output, torch.ones(len(output), device=self._device))
        params = sequence.sampling
        self._strength_P3[place] = torch.tensor(
            [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]
        )
        return place

    def close(self, place: int) -> None:
        self._free.append(place)

    def accept(self, place_S: np.ndarray, token_S: torch.Tensor) -> None:
        """Count new output tokens, each of its place; a place may have several."""
        place = self._to_device(place_S)
        _add(self._seen_PV, self._count_PV, place, token_S)

    def apply(
        self, logits_SV: torch.Tensor, place_S: np.ndarray, drafted: tuple[np.ndarray, np.ndarray] | None = None
    ) -> torch.Tensor:
        """The logits after repetition, frequency and presence penalties, in vLLM's order and meaning.

        Args:
            drafted: tokens that count for some of the rows only, as if they were output: row numbers and tokens, int64.
        """
        place = self._to_device(place_S)
        repetition_S1, frequency_S1, presence_S1 = self._strength_P3[place].unsqueeze(-1).unbind(1)
        seen_SV, count_SV = self._seen_PV[place], self._count_PV[place]
        if drafted is not None:
            _add(seen_SV, count_SV, self._to_device(drafted[0]), self._to_device(drafted[1]))
        factor_SV = torch.where(seen_SV, repetition_S1, 1.0)
        logits_SV = torch.where(logits_SV > 0, logits_SV / factor_SV, logits_SV * factor_SV)
        return logits_SV - frequency_S1 * count_SV - presence_S1 * (count_SV > 0)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device is None else tensor.to(self._device)

    def _grow(self) -> None:
        old = self._seen_PV.shape[0]
        extra = max(4, old)
        self._seen_PV = torch.cat([self._seen_PV, self._seen_PV.new_zeros(extra, self._seen_PV.shape[1])])
        self._count_PV = torch.cat([self._count_PV, self._count_PV.new_zeros(extra, self._count_PV.shape[1])])
        self._strength_P3 = torch.cat([self._strength_P3, self._strength_P3.new_zeros(extra, 3)])
        self._free.extend(range(old + extra - 1, old - 1, -1))


def _add(seen_RV: torch.Tensor, count_RV: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> None:
    seen_RV[row_N, token_N] = True
    count_RV.index_put_((row_N, token_N), torch.ones_like(token_N, dtype=count_RV.dtype), accumulate=True)
