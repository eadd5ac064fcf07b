"""``nccl``: the data plane of GPUs without DeepEP, over ``torch.distributed``.

A device plane (see ``base``) whose messages have sizes that the host knows, so that nothing waits for a count: every
rank sends all its tokens, with their slots and weights, to every expert rank; those pick out the rows of their own
slots. The way back carries one weighted sum a token from every expert rank, 0 where it had nothing to do. With K of 8
and a few ranks a token visits nearly all of them anyway; with many ranks DeepEP sends less.

A message is int32 [T, W], a row a token: hidden state, K weights, K global slots, bit-cast side by side.

Dimensions: as in ``base``; R ranks, E expert ranks, M tokens of all ranks, W words of a message's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from expertmesh.kernels.row_groups import combine_rows, group_rows
from expertmesh.mesh.dataplane.base import Dispatched, Exchange, Pending, PlaneShape
from expertmesh.mesh.dataplane.device_faults import DeviceWait
from expertmesh.mesh.dataplane.nccl_group import Abort
from expertmesh.mesh.errors import DataPlaneError, DeviceLostError

_WORD_BYTES = 4
_STOP_S = 10.0
"""How long exchanges that run may take to end when connections are dropped: some tenths of a second, as a rule."""


class Exchanger(Protocol):
    """The ranks of a view on their GPUs."""

    def exchange(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        """Send ``inputs[r]`` to rank r and receive ``outputs[r]`` from it; empty = nothing. The work has ``wait``."""

    def leave(self) -> bool:
        """Whether all ranks are leaving."""

    def abort(self) -> None:
        """Drop the connections at once."""


@dataclass(frozen=True, slots=True)
class NcclHandle:
    """``num_tokens``: T of this rank. ``place_MK`` and ``weight_MK``: for each token of all ranks and choice its row
    here (-1 = none) and its factor; None on a rank without slots. ``tokens``: by rank.
    """

    num_tokens: int
    tokens: Sequence[int]
    place_MK: torch.Tensor | None
    weight_MK: torch.Tensor | None


class NcclPlane:
    """Implements ``DataPlane``. ``Exchange.tokens`` are what every rank sends, padding included."""

    def __init__(self, group: Exchanger, shape: PlaneShape, device: torch.device, *, timeout_s: float) -> None:
        assert shape.hidden_size * shape.dtype.itemsize % _WORD_BYTES == 0, "checked when the plane was opened"
        self._group: Exchanger | None = group
        self._shape = shape
        self._device = device
        self._device_wait = DeviceWait(timeout_s, DataPlaneError)
        self._expert_index = shape.expert_ranks.index(shape.rank) if shape.rank in shape.expert_ranks else None
        self._hosts = frozenset(shape.expert_ranks)
        self._abort: Abort | None = None

    def connect(self) -> None:
        """Exchange a word with every rank: NCCL connects two of them when they first talk, which no capture allows.

        Raises:
            DataPlaneError: a rank did not come to it in time.
        """
        words = [torch.zeros(1, dtype=torch.int32, device=self._device) for _ in range(2 * self._shape.size)]
        self._exchange(words[: self._shape.size], words[self._shape.size :]).wait()
        self.check()

    @property
    def is_on_device(self) -> bool:
        return True

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> Pending[Dispatched[NcclHandle]]:
        shape, tokens = self._shape, exchange.tokens
        assert x_TH.shape[0] == tokens[shape.rank], "the exchange announces other tokens than it is given"
        message_TW = torch.cat((_words(x_TH), _words(weight_TK), slot_TK.to(torch.int32)), dim=1)
        words = message_TW.shape[1]
        rows = tokens if self._expert_index is not None else [0] * shape.size
        inbox_MW = message_TW.new_empty(sum(rows), words)
        inputs = [message_TW if rank in self._hosts else message_TW[:0] for rank in range(shape.size)]
        work = self._exchange(list(torch.split(inbox_MW, list(rows))), inputs)
        return _PendingDispatch(self, work, inbox_MW, message_TW, tuple(tokens))

    def combine(self, y_NH: torch.Tensor, handle: NcclHandle) -> Pending[torch.Tensor]:
        shape = self._shape
        back_MH = y_NH.new_empty(0, shape.hidden_size)
        parts = [back_MH] * shape.size
        if handle.place_MK is not None and handle.weight_MK is not None:
            back_MH = combine_rows(y_NH, handle.place_MK, handle.weight_MK)
            parts = list(torch.split(back_MH, list(handle.tokens)))
        sums_ETH = y_NH.new_empty(len(shape.expert_ranks), handle.num_tokens, shape.hidden_size)
        outputs = [back_MH[:0]] * shape.size
        for index, rank in enumerate(shape.expert_ranks):
            outputs[rank] = sums_ETH[index]
        return _PendingCombine(self._exchange(outputs, parts), sums_ETH, back_MH)

    def check(self, event: torch.cuda.Event | None = None) -> None:
        """See ``DataPlane``. What runs on the device goes on waiting for a silent peer until ``close``."""
        self._device_wait.wait(event)

    def abandon(self) -> None:
        self._device_wait.abandon()

    def stop(self) -> None:
        """See ``DataPlane``: an exchange that waits for a peer ends when NCCL is told to drop the connections.

        NCCL itself then waits for the graphs that have its exchanges in them to be dropped, in a thread of its own; and
        the driver may wait, with the interpreter held, where a graph is dropped that still runs.
        """
        group, self._group = self._group, None
        if group is None:
            return
        group.leave()
        self._abort = Abort(group.abort)
        if self._device.type == "cuda":
            DeviceWait(_STOP_S, DeviceLostError).wait(None)

    def close(self) -> None:
        """Graphs with exchanges in them have to be dropped between ``stop`` and this."""
        self.stop()
        abort, self._abort = self._abort, None
        if abort is not None:
            abort.wait()

    def _exchange(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        assert self._group is not None, "the plane is closed"
        try:
            return self._group.exchange(outputs, inputs)
        except RuntimeError as error:
            raise DataPlaneError(f"the exchange over NCCL failed: {error}") from error

    def expanded(self, inbox_MW: torch.Tensor, tokens: Sequence[int], num_tokens: int) -> Dispatched[NcclHandle]:
        """What has arrived, grouped by local slot."""
        shape = self._shape
        if self._expert_index is None:
            counts_S = torch.zeros(shape.slots_per_rank, dtype=torch.int32, device=inbox_MW.device)
            rows_NH = torch.empty(0, shape.hidden_size, dtype=shape.dtype, device=inbox_MW.device)
            return Dispatched(rows_NH, counts_S, None, NcclHandle(num_tokens, tokens, None, None))
        words, top_k = inbox_MW.shape[1] - 2 * shape.top_k, shape.top_k
        x_MW, weight_MK, slot_MK = torch.split(inbox_MW, [words, top_k, top_k], dim=1)
        x_MH = x_MW.contiguous().view(shape.dtype)
        weight_MK = weight_MK.contiguous().view(torch.float32)
        local_MK = slot_MK.to(torch.int64) - self._expert_index * shape.slots_per_rank
        local_MK = torch.where((local_MK >= 0) & (local_MK < shape.slots_per_rank), local_MK, -1)
        counts_S = torch.empty(shape.slots_per_rank, dtype=torch.int32, device=inbox_MW.device)
        groups = group_rows(x_MH, local_MK, counts_S)
        handle = NcclHandle(num_tokens, tokens, groups.place_TK, weight_MK)
        expected = sum(tokens) * top_k / (len(shape.expert_ranks) * shape.slots_per_rank)
        return Dispatched(groups.rows_NH, groups.counts_S, None, handle, expected_rows=expected)


def _words(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


@dataclass(frozen=True, slots=True)
class _PendingDispatch(Pending[Dispatched[NcclHandle]]):
    plane: NcclPlane
    work: Any
    inbox_MW: torch.Tensor
    sent_TW: torch.Tensor  # its memory is in use until the exchange is over
    tokens: tuple[int, ...]

    def wait(self) -> Dispatched[NcclHandle]:
        self.work.wait()
        return self.plane.expanded(self.inbox_MW, self.tokens, len(self.sent_TW))


@dataclass(frozen=True, slots=True)
class _PendingCombine(Pending[torch.Tensor]):
    work: Any
    sums_ETH: torch.Tensor
    sent_MH: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.work.wait()
        if len(self.sums_ETH) == 1:
            return self.sums_ETH[0]
        return self.sums_ETH.sum(0, dtype=torch.float32).to(self.sums_ETH.dtype)
