"""What a rank opens for a view: links, data plane, lockstep and migrations, and what its step loop works on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.dataplane import DataPlane, open_dataplane, uses_links
from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.device import CPU
from expertmesh.mesh.framing import Waker
from expertmesh.mesh.graphs import StepGraphs
from expertmesh.mesh.halves import AttentionHalf, ExpertHalf
from expertmesh.mesh.inbox import Inbox
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.meet import Links, meet
from expertmesh.mesh.migration import MigrationContext, Migrations
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.padding import StepSizes, step_sizes
from expertmesh.mesh.placement import RoutingTables
from expertmesh.mesh.rank_security import RankSecurity
from expertmesh.mesh.reporting import RoutingObserver
from expertmesh.mesh.sidegroup import open_side_group
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.steploop import LoopContext
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.mesh.view import ViewInfo
from expertmesh.mesh.weight_reads import WeightTransport
from expertmesh.v1 import mesh_pb2


@dataclass(frozen=True, kw_only=True)
class RankParts:
    """What a rank has in every view.

    ``report``: sends to the balancer, from any thread. ``security``: None = links in the clear. ``weights``: None =
    expert weights come by TCP.
    """

    config: MeshConfig
    spec: ModelSpec
    attention: AttentionHalf | None
    experts: ExpertHalf | None
    observer: RoutingObserver | None
    telemetry: Telemetry
    listener: socket.socket
    waker: Waker
    inbox: Inbox
    report: Callable[[mesh_pb2.JoinRequest], None]
    device: torch.device = CPU
    security: RankSecurity | None = None
    weights: WeightTransport | None = None


class ViewOpener:
    """Opens view after view of one rank; whoever asks closes what it gets."""

    def __init__(self, rank: RankParts) -> None:
        self._rank = rank
        self._clock = StepClock(rank.telemetry, has_experts=rank.experts is not None)

    def meet(self, view: ViewInfo) -> Links:
        """
        Raises:
            DataPlaneError: not all peers came, or one is not who the view says.
        """
        return meet(
            view,
            self._rank.listener,
            self._rank.waker,
            timeout_s=self._rank.config.balancer.view_timeout_s,
            with_data=uses_links(self._rank.config.dataplane, self._rank.device),
            superseded=lambda: self._is_superseded(view),
            security=self._rank.security,
        )

    def plane(self, view: ViewInfo, links: Links) -> DataPlane[Any]:
        """
        Raises:
            DataPlaneError: not all ranks came to it.
        """
        return open_dataplane(
            self._rank.config.dataplane,
            view,
            self._plane_shape(view),
            links.data,
            self._rank.device,
            join_s=self._rank.config.balancer.view_timeout_s,
            superseded=lambda: self._is_superseded(view),
        )

    def lockstep(
        self, view: ViewInfo, links: Links, next_view: Callable[[], int], listed: Callable[[], Sequence[int]]
    ) -> Lockstep:
        """``next_view`` and ``listed``: what it asks before every step, the latter for migrations to switch to."""
        rank, dataplane = self._rank, self._rank.config.dataplane
        captures_graphs = rank.device.type == "cuda"
        return Lockstep(
            view,
            links.lockstep,
            rank.waker,
            next_view,
            listed,
            timeout_s=dataplane.timeout_s,
            idle_tick_s=dataplane.idle_tick_s,
            join_s=rank.config.balancer.view_timeout_s if captures_graphs else 0.0,
        )

    def migrations(self, view: ViewInfo, routing: RoutingTables, links: Links) -> Migrations:
        """Started; the side links are theirs from now on."""
        rank = self._rank
        bytes_per_s = rank.config.balancer.migration_bytes_per_s
        side = None
        if links.side:
            reads = rank.weights.reads() if rank.weights is not None else None
            side = open_side_group(view, links.hand_over_side(), bytes_per_s, reads)
        migrations = Migrations(
            MigrationContext(
                view=view,
                num_experts=rank.spec.num_experts,
                experts=rank.experts,
                routing=routing if rank.attention is not None else None,
                side=side,
                report=rank.report,
                wake=rank.waker.wake,
                telemetry=rank.telemetry,
                device=rank.device,
            )
        )
        migrations.start()
        return migrations

    def context(
        self,
        view: ViewInfo,
        plane: DataPlane[Any],
        lockstep: Lockstep,
        migrations: Migrations,
        routing: RoutingTables,
    ) -> LoopContext:
        """What the step loop works on."""
        rank, config = self._rank, self._rank.config
        has_graphs = rank.device.type == "cuda"
        sizes = step_sizes(config.attention, config.dataplane.micro_batches) if has_graphs else StepSizes()
        return LoopContext(
            view=view,
            attention=rank.attention,
            experts=rank.experts,
            plane=plane,
            lockstep=lockstep,
            migrations=migrations,
            routing=routing,
            observer=rank.observer,
            moe_layers=rank.spec.moe_layers,
            hidden_size=rank.spec.hidden_size,
            top_k=rank.spec.top_k,
            dtype=rank.spec.dtype,
            max_num_tokens=self._max_num_tokens(view),
            clock=self._clock,
            graphs=StepGraphs(rank.device, is_alone=view.size == 1) if has_graphs else None,
            sizes=sizes,
            device=rank.device,
        )

    def _is_superseded(self, view: ViewInfo) -> bool:
        return self._rank.inbox.closed or self._rank.inbox.known_view > view.number

    def _max_num_tokens(self, view: ViewInfo) -> int:
        """A rank on its own on a device sends nothing, so that nothing bounds what it exchanges."""
        if self._rank.device.type == "cuda" and view.size == 1:
            return self._rank.config.attention.max_num_batched_tokens
        return self._rank.config.dataplane.max_num_tokens

    def _plane_shape(self, view: ViewInfo) -> PlaneShape:
        return PlaneShape(
            rank=view.rank,
            size=view.size,
            expert_ranks=view.expert_ranks,
            slots_per_rank=view.slots_per_rank,
            hidden_size=self._rank.spec.hidden_size,
            top_k=self._rank.spec.top_k,
            dtype=self._rank.spec.dtype,
            max_num_tokens=self._rank.config.dataplane.max_num_tokens,
        )
