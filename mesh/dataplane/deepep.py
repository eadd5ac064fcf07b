"""``deepep``: the data plane over DeepEP V2's ``ElasticBuffer`` (https://github.com/deepseek-ai/DeepEP).

A device plane (see ``base``). What arrives is in the expanded layout: one row per (token, local slot), slot after slot
**without gaps** (``expert_alignment=1``: rows start at multiples of 2H bytes and nothing more), in any order within a
slot; the counts are on the device and no call waits for them. So N is what there is room for: ranks × capacity ×
min(K, S).

A step's ``Exchange.capacity`` is rounded up to one of a few, because DeepEP compiles its kernels for it
(``capacities``). ``prepare`` compiles them without launching one: a rank that compiles in the middle of a step would
keep its peers waiting in a kernel until their time-out.

DeepEP counts S ids for every rank of the group, ours count S for every *expert* rank. The group's order puts the expert
ranks of a node first, so that on one node both are the same number and nothing has to be translated.

A peer that is silent for longer than the time-out makes the kernels trap, and a trap ends the CUDA context: the process
has to be started again (``DeviceLostError``).

The placement version of an exchange is not sent along: all ranks take it from the same message of the lockstep.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.kernels.fp8_rows import dequantize_rows, quantize_rows
from expertmesh.mesh.dataplane.base import Dispatched, Exchange, Pending, PlaneShape
from expertmesh.mesh.dataplane.device_faults import DeviceWait, as_device_lost
from expertmesh.mesh.dataplane.nccl_group import Abort, NcclGroup
from expertmesh.mesh.errors import DataPlaneError, DeviceLostError

log = logging.getLogger(__name__)

_SMALLEST_CAPACITY = 32
_CAPACITY_STEP = 8
_TRAP_S = 2
"""From a kernel's trap to its error on the host: 1.6 s were measured."""
_COMPILE_S = 300.0

_FEW_TOKENS, _FEW_SMS, _MANY_SMS = 256, 24, 64
"""Up to so many tokens more multiprocessors gain nothing; at 4096, 64 of them are 16 to 23 % faster than 24, and all of
them 1 to 4 % faster still (benchmarks/results/gpu_dataplane_sms.json)."""

_LOST: list[Any] = []
"""Buffers of a lost context: their destructors would end the process before it has said why."""


@dataclass(frozen=True, slots=True)
class DeepEpSettings:
    """``num_sms``: multiprocessors that an exchange takes, None = by its size. ``fp8_dispatch``: tokens travel as
    float8_e4m3 with a float32 scale per 128 elements. ``timeout_s``: silence of a peer after which this rank gives up.
    """

    num_sms: int | None
    fp8_dispatch: bool
    timeout_s: float

    @property
    def kernel_timeout_s(self) -> int:
        """Whole seconds after which the kernels trap: soon enough that the host knows in time."""
        return max(1, math.floor(self.timeout_s) - _TRAP_S)

    @property
    def host_timeout_s(self) -> float:
        return max(self.timeout_s, float(self.kernel_timeout_s + _TRAP_S))

    def sms_for(self, capacity: int) -> int:
        return self.num_sms or (_FEW_SMS if capacity <= _FEW_TOKENS else _MANY_SMS)


@dataclass(frozen=True, slots=True)
class DeepEpHandle:
    """DeepEP's own handle and the float32 weight of each row."""

    inner: Any
    weight_N: torch.Tensor


def capacities(max_num_tokens: int) -> tuple[int, ...]:
    """The capacities that kernels are compiled for: 32, 256, 2048 ... and the maximum itself."""
    sizes, size = [], _SMALLEST_CAPACITY
    while size < max_num_tokens:
        sizes.append(size)
        size *= _CAPACITY_STEP
    return (*sizes, max_num_tokens)


def group_order(expert_ranks: Sequence[int], nodes: Sequence[str]) -> tuple[int, ...]:
    """View ranks in the order of DeepEP's group: node by node, the expert ranks of a node first."""
    first = {node: nodes.index(node) for node in nodes}
    hosts = frozenset(expert_ranks)
    return tuple(sorted(range(len(nodes)), key=lambda rank: (first[nodes[rank]], rank not in hosts, rank)))


def slot_ids(order: Sequence[int], expert_ranks: Sequence[int], slots_per_rank: int) -> list[int] | None:
    """DeepEP's id of each global slot, and -1 at the end for slot -1; None where ids and slots are the same."""
    places = [order.index(rank) for rank in expert_ranks]
    if places == list(range(len(places))):
        return None
    return [place * slots_per_rank + slot for place in places for slot in range(slots_per_rank)] + [-1]


class DeepEpPlane:
    """Implements ``DataPlane``. All methods but ``abandon`` belong to the step thread."""

    def __init__(
        self, buffer: Any, group: NcclGroup, shape: PlaneShape, order: Sequence[int], settings: DeepEpSettings
    ) -> None:
        self._buffer: Any = buffer
        self._group = group
        self._shape = shape
        self._settings = settings
        self._device_wait = DeviceWait(settings.host_timeout_s, DeviceLostError)
        self._is_host = shape.rank in shape.expert_ranks
        self._capacities = capacities(shape.max_num_tokens)
        ids = slot_ids(order, shape.expert_ranks, shape.slots_per_rank)
        self._id_G = None if ids is None else torch.tensor(ids, device="cuda")

    @property
    def is_on_device(self) -> bool:
        return True

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> Pending[Dispatched[DeepEpHandle]]:
        """See ``DataPlane``. A token must not choose the same slot twice.

        ``x_TH`` and ``weight_TK`` must hold still until ``wait``, ``slot_TK`` until that of the combine.
        """
        shape = self._shape
        # A negative index counts from the end, where -1 stands.
        id_TK = slot_TK if self._id_G is None else self._id_G[slot_TK]
        capacity = self._capacity(exchange.capacity)
        assert len(x_TH) <= capacity, "no rank sends more than the exchange has room for"
        x: Any = quantize_rows(x_TH) if self._settings.fp8_dispatch else x_TH
        try:
            rows, _, weight_N, inner, event = self._buffer.dispatch(
                x,
                topk_idx=id_TK,
                topk_weights=weight_TK,
                num_experts=shape.size * shape.slots_per_rank,
                num_max_tokens_per_rank=capacity,
                expert_alignment=1,
                num_sms=self._settings.sms_for(capacity),
                async_with_compute_stream=True,
                do_handle_copy=False,
                do_cpu_sync=False,
                do_expand=True,
            )
        except RuntimeError as error:
            raise _as_error(error) from error
        handle = DeepEpHandle(inner, weight_N)
        expected = sum(exchange.tokens) * shape.top_k / (len(shape.expert_ranks) * shape.slots_per_rank)
        return _PendingDispatch(event, rows, handle, self._is_host, expected)

    def combine(self, y_NH: torch.Tensor, handle: DeepEpHandle) -> Pending[torch.Tensor]:
        if not len(y_NH):  # a rank without slots: DeepEP wants a row length all the same
            y_NH = y_NH.new_empty(1, self._shape.hidden_size)
        try:
            out_TH, _, event = self._buffer.combine(y_NH, handle.inner, async_with_compute_stream=True)
        except RuntimeError as error:
            raise _as_error(error) from error
        return _PendingCombine(event, out_TH)

    def check(self, event: torch.cuda.Event | None = None) -> None:
        """See ``DataPlane``. A peer that was silent for the time-out has ended the CUDA context.

        Raises:
            DeviceLostError: it has, or will: a kernel that waits for a peer cannot be called off.
        """
        self._device_wait.wait(event)

    def abandon(self) -> None:
        self._device_wait.abandon()

    def prepare(self, superseded: Callable[[], bool]) -> None:
        """Compile the kernels for every capacity. All ranks call it; none goes on before all are done.

        Raises:
            DataPlaneError: a rank did not come to it in time, or the view is superseded.
        """
        began = time.monotonic()
        shape = self._shape
        x_TH = torch.zeros(1, shape.hidden_size, dtype=shape.dtype, device="cuda")
        slot_TK = torch.full((1, shape.top_k), -1, device="cuda")
        weight_TK = torch.zeros(1, shape.top_k, device="cuda")
        for capacity in self._capacities:
            # Captured and thrown away: kernels are compiled and loaded, and none is launched.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
                exchange = Exchange(layer=0, version=0, tokens=[1] * shape.size, capacity=capacity)
                dispatched = self.dispatch(x_TH, slot_TK, weight_TK, exchange).wait()
                self.combine(dispatched.rows_NH, dispatched.handle).wait()
        if not self._group.agree("prepared", _COMPILE_S, superseded):
            why = "a newer view is known" if superseded() else f"{_COMPILE_S:g} s are over"
            raise DataPlaneError(f"not all ranks have compiled DeepEP's kernels; {why}")
        log.info("DeepEP's kernels for capacities %s in %.1f s", self._capacities, time.monotonic() - began)

    def stop(self) -> None:
        """See ``DataPlane``: kernels that wait for a peer trap, which ends the CUDA context."""
        try:
            self.check()
        except DeviceLostError:
            _LOST.append(self._buffer)
            raise

    def close(self) -> None:
        """Free the buffer. Where a peer has gone it cannot be freed in good order, which takes all of them."""
        if self._buffer is None:
            return
        self.stop()
        buffer, self._buffer = self._buffer, None
        if self._group.leave():
            buffer.destroy()
        else:
            log.warning("a rank left without a word: its buffer is dropped, not closed")
        drop(self._group)

    def _capacity(self, num_tokens: int) -> int:
        """The least one with kernels. What a step's size is rounded up to may be more than is ever sent."""
        return next((capacity for capacity in self._capacities if num_tokens <= capacity), self._capacities[-1])


def _as_error(error: RuntimeError) -> DataPlaneError:
    return as_device_lost(error) or DataPlaneError(f"DeepEP failed: {error}")


@dataclass(frozen=True, slots=True)
class _PendingDispatch(Pending[Dispatched[DeepEpHandle]]):
    event: Any
    rows: Any
    handle: DeepEpHandle
    is_host: bool
    expected_rows: float

    def wait(self) -> Dispatched[DeepEpHandle]:
        self.event.current_stream_wait(release_handle=True)
        rows, handle = self.rows, self.handle
        counts_S = handle.inner.num_unaligned_recv_tokens_per_expert
        if not self.is_host:
            rows_NH = (rows[0] if isinstance(rows, tuple) else rows)[:0].to(torch.bfloat16)
            return Dispatched(rows_NH, counts_S, None, handle)
        if isinstance(rows, tuple):
            end = handle.inner.psum_num_recv_tokens_per_expert[-1:]  # where the last slot's rows end
            rows = dequantize_rows(rows[0], rows[1], end)
        return Dispatched(rows, counts_S, None, handle, expected_rows=self.expected_rows, factor_N=handle.weight_N)


@dataclass(frozen=True, slots=True)
class _PendingCombine(Pending[torch.Tensor]):
    event: Any
    out_TH: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.event.current_stream_wait(release_handle=True)
        return self.out_TH


def drop(group: NcclGroup) -> None:
    """Drop the connections of a group that DeepEP was given; it remembers those of every group that it has seen.

    Raises:
        DeviceLostError: they cannot be dropped.
    """
    from deep_ep.utils import comm

    comm._storage.pop(group.group, None)
    Abort(group.abort).wait()
