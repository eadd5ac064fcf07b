"""Ranks on a device, in process, alone in their view or not: the real step loop, lockstep, engine and slots.

What a mesh adds to it is gRPC and the balancer. On the CPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from expertmesh.attention_server.gpu_half import GpuHalf
from expertmesh.expert_server.gpu_slots import GpuSlots
from expertmesh.expert_server.gpu_weights import Fp8
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.dataplane import DataPlane
from expertmesh.mesh.dataplane.local import LocalPlane
from expertmesh.mesh.framing import Link, Waker
from expertmesh.mesh.graphs import StepGraphs
from expertmesh.mesh.halves import SlotChange
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.migration import MigrationContext, Migrations
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.padding import StepSizes, step_sizes
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.steploop import LoopContext, Progress, StepLoop
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.mesh.view import HOSTS_ATTENTION, HOSTS_EXPERTS, ViewInfo
from expertmesh.v1 import mesh_pb2
from support.engine_driver import EngineDriver


def solo_view(spec: ModelSpec, num_slots: int) -> ViewInfo:
    """One rank whose slot s holds expert s, as far as there are experts."""
    slots = [slot if slot < spec.num_experts else -1 for slot in range(num_slots)]
    view = mesh_pb2.View(
        number=1,
        slots_per_rank=num_slots,
        ranks=[mesh_pb2.Rank(rank=0, server_id="solo", incarnation="1", role=mesh_pb2.ROLE_BOTH, node="n")],
        placement=[mesh_pb2.LayerPlacement(layer=layer, version=1, slots=slots) for layer in spec.moe_layers],
    )
    return ViewInfo(view, 0)


class EngineRank(EngineDriver):
    """One rank of a view: submit sequences, then step.

    Args:
        plane: of this rank. links: to the others, for the lockstep, by rank. next_view: as the lockstep asks for it.
        uses_graphs: None = on a GPU. pads: steps are padded also where no graph runs them.
        max_num_tokens: of one rank in one exchange. micro_batches: of a step of several sequences.
        config: keys of ``attention``.
    """

    half: GpuHalf
    slots: GpuSlots

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        device: torch.device,
        view: ViewInfo,
        plane: DataPlane[Any],
        links: dict[int, Link],
        *,
        next_view: Callable[[], int] = lambda: 1,
        uses_graphs: bool | None = None,
        pads: bool = False,
        fp8: Fp8 = "off",
        max_num_tokens: int = 2**30,
        micro_batches: int = 1,
        **config: Any,
    ) -> None:
        telemetry = disabled_telemetry()
        super().__init__(spec)
        self.view, self.plane = view, plane
        role = view.proto.ranks[view.rank].role
        has_attention, has_experts = role in HOSTS_ATTENTION, role in HOSTS_EXPERTS
        num_slots = view.slots_per_rank
        self._waker = Waker()
        if has_experts:
            loaded = telemetry.metrics.slots_loaded
            self.slots = GpuSlots(spec, checkpoint, num_slots, loaded, device, spare=num_slots, fp8=fp8)
            self.slots.load(view.local_slots())
        attention, topology = AttentionConfig(**config), Topology.of(view)
        self.routing = RoutingTables(view.proto.placement, spec.num_experts, topology)
        if has_attention:
            self.half = GpuHalf(
                attention,
                spec,
                checkpoint,
                telemetry,
                device,
                step_sample_interval_s=1.0,
                clock=lambda: self.now[0],
                micro_batches=micro_batches,
            )
            self.half.bind(self.routing, topology, plane.check)
            self.half.set_waker(self._waker.wake)
            self._listen()
        self.reports: list[mesh_pb2.JoinRequest] = []
        self.migrations = Migrations(
            MigrationContext(
                view=view,
                num_experts=spec.num_experts,
                experts=self.slots if has_experts else None,
                routing=self.routing if has_attention else None,
                side=None,
                report=self.reports.append,
                wake=self._waker.wake,
                telemetry=telemetry,
            )
        )
        with_graphs = device.type == "cuda" if uses_graphs is None else uses_graphs
        self._lockstep = Lockstep(
            view, links, self._waker, next_view, self.migrations.listed, timeout_s=60.0, idle_tick_s=0.0, join_s=180.0
        )
        self.graphs = StepGraphs(device, is_alone=view.size == 1) if with_graphs else None
        self.loop = StepLoop(
            LoopContext(
                view=view,
                attention=self.half if has_attention else None,
                experts=self.slots if has_experts else None,
                plane=plane,
                lockstep=self._lockstep,
                migrations=self.migrations,
                routing=self.routing,
                observer=None,
                moe_layers=spec.moe_layers,
                hidden_size=spec.hidden_size,
                top_k=spec.top_k,
                dtype=spec.dtype,
                max_num_tokens=max_num_tokens,
                clock=StepClock(telemetry, has_experts=has_experts),
                graphs=self.graphs,
                sizes=step_sizes(attention, micro_batches) if with_graphs or pads else StepSizes(),
                device=device,
            ),
            Progress(),
        )
        self.loop.capture()

    def migrate(self, layer: int, order: Sequence[int]) -> None:
        """Give slot i of a layer what slot ``order[i]`` holds, as a migration that is staged and switched at once."""
        held = self.slots.slots(layer)
        wanted = [held[slot] for slot in order]
        changes = []
        with torch.inference_mode():
            staged = self.slots.reserve(sum(expert >= 0 for expert in wanted))
            memory = iter(staged)
            for slot, (source, expert) in enumerate(zip(order, wanted, strict=True)):
                if expert < 0:
                    changes.append(SlotChange(slot, -1, None))
                    continue
                into = next(memory)
                for part, there in zip(into, self.slots.read(layer, source), strict=True):
                    part.copy_(there)
                changes.append(SlotChange(slot, expert, into))
            self.slots.commit(layer, changes)
            self.slots.release(staged)
            self.routing.replace(mesh_pb2.LayerPlacement(layer=layer, version=2, slots=wanted))

    def swap_weights(self, layer: int, first: int, second: int) -> None:
        """Two slots change their weights, and the routing does not know it."""
        with torch.inference_mode():
            staged = self.slots.reserve(2)
            for into, slot in zip(staged, (second, first), strict=True):
                for part, there in zip(into, self.slots.read(layer, slot), strict=True):
                    part.copy_(there)
            held = self.slots.slots(layer)
            changes = [SlotChange(slot, held[slot], into) for into, slot in zip(staged, (first, second), strict=True)]
            self.slots.commit(layer, changes)
            self.slots.release(staged)

    def step(self) -> int:
        """One turn of the loop; returns the tokens of its step."""
        with torch.inference_mode():
            go = self.loop.exchange()
            self.loop.step(go)
        return sum(go.num_tokens)

    def wake(self) -> None:
        self._waker.wake()

    def close(self) -> None:
        self.loop.close()
        self._lockstep.close()
        self._waker.close()


class SoloRank(EngineRank):
    """The only rank of its view."""

    plane: LocalPlane

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        device: str,
        *,
        uses_graphs: bool | None = None,
        spare_slots: int = 0,
        **config: Any,
    ) -> None:
        there, num_slots = torch.device(device), spec.num_experts + spare_slots
        plane = LocalPlane(num_slots, there)
        super().__init__(
            spec, checkpoint, there, solo_view(spec, num_slots), plane, {}, uses_graphs=uses_graphs, **config
        )
