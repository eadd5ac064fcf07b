"""The one step loop: what every rank of a view does, whatever its role.

For each step the ranks agree in lockstep, then pass through all MoE layers together: attention halves compute up to
the experts, the data plane dispatches, expert halves compute, the data plane combines. A rank without one of the
halves, or without tokens, takes part with nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expertmesh.mesh.dataplane import DataPlane, Dispatched, Exchange
from expertmesh.mesh.dataplane.collective import CollectiveHandle
from expertmesh.mesh.halves import AttentionHalf, ExpertHalf
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.migration import Migrations
from expertmesh.mesh.placement import RoutingTables
from expertmesh.mesh.reporting import RoutingObserver
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopContext:
    """What the loop of one view works with. ``view`` is as it began; its placements may be switched since."""

    view: ViewInfo
    attention: AttentionHalf | None
    experts: ExpertHalf | None
    plane: DataPlane[CollectiveHandle]
    lockstep: Lockstep
    migrations: Migrations
    routing: RoutingTables
    observer: RoutingObserver | None
    moe_layers: Sequence[int]
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    max_num_tokens: int
    clock: StepClock


@dataclass
class Progress:
    """Written by the step thread, read by the heartbeat."""

    step: int = 0


class StepLoop:
    """Steps in one view until it ends (``run`` returns) or breaks (``DataPlaneError``)."""

    def __init__(self, context: LoopContext, progress: Progress) -> None:
        self._c = context
        self._progress = progress
        self._versions = context.view.versions
        self._no_x = torch.empty(0, context.hidden_size, dtype=context.dtype)
        self._no_slots = torch.empty(0, context.top_k, dtype=torch.int64)
        self._no_weights = torch.empty(0, context.top_k, dtype=torch.float32)

    def run(self) -> None:
        """Step until the leader ends the view in good order."""
        with torch.inference_mode():
            while True:
                go = self.exchange()
                if go.stop:
                    return
                self.step(go)

    def exchange(self) -> mesh_pb2.StepGo:
        """The lockstep before a step."""
        started = time.perf_counter()
        go = self._c.lockstep.exchange(self._ready)
        self._c.clock.header(time.perf_counter() - started)
        return go

    def _ready(self) -> mesh_pb2.StepReady:
        ready = mesh_pb2.StepReady()
        if self._c.attention is not None:
            ready.num_tokens = self._c.attention.prepare()
            if ready.num_tokens:
                ready.traceparent = self._c.attention.traceparent()
        return ready

    def step(self, go: mesh_pb2.StepGo) -> None:
        """Switch the layers whose migrations are due, then one forward pass of all layers.

        Raises:
            DataPlaneError: the view broke; nothing that a client can see has changed.
        """
        self._c.migrations.switch(go.commits, go.step)
        self._versions = self._c.migrations.view.versions
        tokens = list(go.num_tokens)
        if any(tokens):
            clock = self._c.clock
            clock.start(go)
            attention = self._c.attention if tokens[self._c.view.rank] else None
            if attention is not None:
                attention.begin()
                if self._c.observer is not None:
                    self._c.observer.begin()
            for layer in self._c.moe_layers:
                self._layer(layer, attention, tokens)
            clock.attention_done()
            if attention is not None:
                attention.finish()
                self._c.routing.commit()
                if self._c.observer is not None:
                    self._c.observer.commit()
            clock.finish(sum(tokens))
        self._progress.step = go.step

    def _layer(self, layer: int, attention: AttentionHalf | None, tokens: list[int]) -> None:
        x_TH, slot_TK, weight_TK = self._no_x, self._no_slots, self._no_weights
        if attention is not None:
            x_TH, routes = attention.before_experts(layer)
            slot_TK = self._c.routing[layer].choose(routes.expert_TK)
            weight_TK = routes.weight_TK
            if self._c.observer is not None:
                self._c.observer.observe(self._versions[layer], routes.expert_TK, slot_TK)
        self._c.clock.attention_done()
        limit = self._c.max_num_tokens
        if max(tokens) <= limit:
            out_TH = self._exchange(layer, x_TH, slot_TK, weight_TK, tokens)
        else:
            out_TH = torch.cat(
                [
                    self._exchange(
                        layer,
                        x_TH[start : start + limit],
                        slot_TK[start : start + limit],
                        weight_TK[start : start + limit],
                        [min(limit, max(0, count - start)) for count in tokens],
                    )
                    for start in range(0, max(tokens), limit)
                ]
            )
        if attention is not None:
            attention.after_experts(layer, out_TH)

    def _exchange(
        self, layer: int, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, tokens: list[int]
    ) -> torch.Tensor:
        """Dispatch, expert compute and combine of at most ``max_num_tokens`` tokens a rank."""
        clock, plane = self._c.clock, self._c.plane
        exchange = Exchange(layer=layer, version=self._versions[layer], tokens=tokens)
        dispatched: Dispatched[CollectiveHandle] = plane.dispatch(x_TH, slot_TK, weight_TK, exchange).wait()
        clock.dispatched(layer, dispatched.num_tokens)
        y_NH = dispatched.rows_NH
        if self._c.experts is not None and y_NH.shape[0]:
            y_NH = self._c.experts.compute(layer, y_NH, dispatched.counts_S)
        clock.computed()
        out_TH = plane.combine(y_NH, dispatched.handle).wait()
        clock.combined()
        return out_TH
