"""``local``: the data plane of a view whose only rank has both halves: nothing is sent, rows are regrouped in place.

A device plane (see ``base``): one launch groups a decode step's rows by slot, one adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expertmesh.kernels.row_groups import combine_rows, group_rows
from expertmesh.mesh.dataplane.base import Dispatched, Exchange, Pending, R


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """The row of each token's choices, and their factors."""

    place_TK: torch.Tensor
    weight_TK: torch.Tensor


class LocalPlane:
    """Implements ``DataPlane``; all of it is work on the current stream.

    ``counts``: by layer, int32 [S], rows of each slot in its last exchange of a first micro-batch, for whoever wants to
    know how many experts were active.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._num_slots = num_slots
        self._device = device
        self.counts: dict[int, torch.Tensor] = {}
        self._counts_of_second: dict[int, torch.Tensor] = {}

    @property
    def is_on_device(self) -> bool:
        return True

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> Pending[Dispatched[LocalHandle]]:
        counts = self._counts_of_second if exchange.micro_batch else self.counts
        if exchange.layer not in counts:
            counts[exchange.layer] = torch.empty(self._num_slots, dtype=torch.int32, device=self._device)
        groups = group_rows(x_TH, slot_TK, counts[exchange.layer])
        handle = LocalHandle(groups.place_TK, weight_TK)
        return _Done(Dispatched(groups.rows_NH, groups.counts_S, None, handle))

    def combine(self, y_NH: torch.Tensor, handle: LocalHandle) -> Pending[torch.Tensor]:
        return _Done(combine_rows(y_NH, handle.place_TK, handle.weight_TK))

    def check(self, event: torch.cuda.Event | None = None) -> None:
        """Nobody can be lost."""
        if event is not None:
            event.synchronize()

    def abandon(self) -> None:
        """The device is waited for no longer than its work takes."""

    def stop(self) -> None:
        """What runs on the device waits for nobody."""

    def close(self) -> None:
        """Nobody waits."""


@dataclass(frozen=True, slots=True)
class _Done(Pending[R]):
    result: R

    def wait(self) -> R:
        return self.result
