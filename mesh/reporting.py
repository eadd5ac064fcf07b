"""From the step loop to the balancer: an attention half's routing statistics and recordings."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from expertmesh.mesh.placement import Ints, Topology
from expertmesh.mesh.recorder import TraceRecorder
from expertmesh.mesh.statistics import RoutingCounts, RoutingStatistics
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

if TYPE_CHECKING:  # needs Triton, which is there only where a GPU is
    from expertmesh.mesh.device_routing import DeviceRouting, DeviceTotals


DEVICE_FETCH_INTERVAL_S = 1.0
"""A rank that counts on a GPU fetches the counts so often."""
_CHUNK_INTERVAL_S = 0.1
_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a device counted in steps of so many tokens, all under these placement versions."""

    versions_L: list[int]
    num_tokens: int
    totals: DeviceTotals


class RoutingObserver:
    """What the step loop tells about routing. A step counts once, when it is completed, however often it was begun.

    Belongs to the step thread.
    """

    def __init__(self, statistics: RoutingStatistics, recorder: TraceRecorder, moe_layers: Sequence[int]) -> None:
        self._statistics = statistics
        self._recorder = recorder
        self._moe_layers = tuple(moe_layers)
        self._versions: list[int] = []
        self._expert_LTK: list[Ints] = []
        self._slot_LTK: list[Ints] = []
        self._recorded_LTK: list[torch.Tensor] = []
        self._counted_tokens = 0
        self._fetched_s = 0.0
        self._on_the_way = deque[_Counted]()

    def enter_view(self, view: ViewInfo) -> None:
        # What a device counted under the old view and has not sent is lost with its tables.
        self._on_the_way.clear()
        self._counted_tokens = 0
        versions = [view.versions[layer] for layer in self._moe_layers]
        self._statistics.enter_view(view.number, versions, Topology.of(view))

    def begin(self) -> None:
        """A step begins, perhaps once more."""
        self._versions, self._expert_LTK, self._slot_LTK, self._recorded_LTK = [], [], [], []

    def observe(self, version: int, expert_TK: torch.Tensor, slot_TK: torch.Tensor, *, goes_on: bool = False) -> None:
        """The next MoE layer's choices, and the slots of its placement ``version`` that they went to.

        ``goes_on``: of the layer of the call before, for the tokens behind those.
        """
        if not goes_on:
            self._versions.append(version)
        self._expert_LTK.append(expert_TK.numpy())
        self._slot_LTK.append(slot_TK.numpy())

    def commit(self) -> None:
        """The step is completed."""
        shape = len(self._versions), -1, self._expert_LTK[0].shape[1]
        expert_LTK = np.concatenate(self._expert_LTK).reshape(shape)
        self._statistics.add(self._versions, expert_LTK, np.concatenate(self._slot_LTK).reshape(shape))
        self._recorder.record(expert_LTK)

    # -- ranks whose gates count on the device ----------------------------------------------------------------------

    @property
    def is_recording(self) -> bool:
        """Every layer's choices are wanted, token by token."""
        return self._recorder.is_active

    def observe_on_device(self, expert_TK: torch.Tensor, *, goes_on: bool = False) -> None:
        """The next MoE layer's choices of a step that no graph runs; ``goes_on`` as for ``observe``."""
        if not self.is_recording:
            return
        if goes_on:
            expert_TK = torch.cat([self._recorded_LTK.pop(), expert_TK])
        self._recorded_LTK.append(expert_TK)

    def commit_on_device(self, versions: Mapping[int, int], num_tokens: int, routing: DeviceRouting) -> None:
        """A step is enqueued; now and then send for what the device has counted, and take it when it has come."""
        if self._recorded_LTK:
            self._recorder.record(torch.stack(self._recorded_LTK).cpu().numpy())
            self._recorded_LTK = []
        self._counted_tokens += num_tokens
        while self._on_the_way and self._on_the_way[0].totals.is_there:
            counted = self._on_the_way.popleft()
            self._statistics.add_totals(counted.versions_L, counted.num_tokens, *counted.totals.fetch())
        if not self._on_the_way and time.monotonic() - self._fetched_s >= DEVICE_FETCH_INTERVAL_S:
            self.flush_device(versions, routing)

    def flush_device(self, versions: Mapping[int, int], routing: DeviceRouting) -> None:
        """Send for what was counted under these versions: what steps count that are enqueued from now on is apart from
        it. Nothing is waited for, so that placements can change behind a step that runs."""
        if not self._counted_tokens:
            return
        versions_L = [versions[layer] for layer in self._moe_layers]
        self._on_the_way.append(_Counted(versions_L, self._counted_tokens, routing.take_totals()))
        self._counted_tokens, self._fetched_s = 0, time.monotonic()


class Outbox(Protocol):
    """What this module needs of the connection to the balancer."""

    @property
    def is_drained(self) -> bool:
        """Connected, and nothing waits to be sent."""

    def send(self, message: mesh_pb2.JoinRequest) -> None: ...


class RoutingReporter:
    """Sends what an observer saw: statistics every so often, recordings while they run.

    Belongs to the event loop. While the balancer cannot be reached the counts go on adding up and come with the next
    report.
    """

    def __init__(self, moe_layers: Sequence[int], *, num_experts: int, top_k: int, interval_s: float) -> None:
        self._statistics = RoutingStatistics(moe_layers, num_experts=num_experts, top_k=top_k)
        self._recorder = TraceRecorder(len(moe_layers), top_k)
        self.observer = RoutingObserver(self._statistics, self._recorder, moe_layers)
        self._interval_s = interval_s
        self._sequences = itertools.count(1)
        self._recording = asyncio.Event()

    def control(self, control: mesh_pb2.RecordControl) -> None:
        """The balancer starts or stops a recording."""
        self._recorder.control(control)
        self._recording.set()

    async def run(self, outbox: Outbox) -> None:
        """Report for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report_statistics(outbox), name="routing-statistics")
            group.create_task(self._send_recordings(outbox), name="routing-recordings")

    async def _report_statistics(self, outbox: Outbox) -> None:
        pause_s = self._interval_s
        while True:
            await asyncio.sleep(pause_s)
            # Asked again soon: heartbeats are sent by a timer too, which may meet this one every time.
            pause_s = self._interval_s if outbox.is_drained else _RETRY_S
            if not outbox.is_drained:
                continue
            counts = self._statistics.take()
            if counts is not None:
                for report in await asyncio.to_thread(self._build, counts):
                    outbox.send(mesh_pb2.JoinRequest(stats=report))

    def _build(self, counts: RoutingCounts) -> list[mesh_pb2.StatsReport]:
        return list(self._statistics.reports(counts, self._sequences))

    async def _send_recordings(self, outbox: Outbox) -> None:
        while True:
            await self._recording.wait()
            self._recording.clear()
            while self._recorder.is_active:
                if outbox.is_drained:
                    for chunk in self._recorder.take():
                        outbox.send(mesh_pb2.JoinRequest(trace=chunk))
                await asyncio.sleep(_CHUNK_INTERVAL_S)
