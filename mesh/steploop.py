"""The one step loop: what every rank of a view does, whatever its role.

For each step the ranks agree in lockstep, then pass through all MoE layers together: attention halves compute up to
the experts, the data plane dispatches, expert halves compute, the data plane combines. A rank without one of the
halves, or without tokens, takes part with nothing. On a device the pass through the layers is captured into a CUDA
graph for each size of decode steps, and replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from expertmesh.mesh.dataplane import DataPlane, Dispatched, Exchange
from expertmesh.mesh.device import CPU
from expertmesh.mesh.graphs import StepGraphs, round_up
from expertmesh.mesh.halves import AttentionHalf, DeviceAttentionHalf, ExpertHalf
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.migration import Migrations
from expertmesh.mesh.placement import RoutingTables
from expertmesh.mesh.reporting import RoutingObserver
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.view import HOSTS_ATTENTION, ViewInfo
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopContext:
    """What the loop of one view works with. ``view`` is as it began; its placements may be switched since.

    With a device plane the attention half is a ``DeviceAttentionHalf``. Decode steps of up to the last of
    ``graph_sizes``, which are the same on all ranks, are padded to one of them then; on a GPU ``graphs`` hold these
    steps. ``eager_sizes``: tokens of other steps, for which kernels are compiled beforehand.
    """

    view: ViewInfo
    attention: AttentionHalf | None
    experts: ExpertHalf | None
    plane: DataPlane[Any]
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
    graphs: StepGraphs | None = None
    graph_sizes: Sequence[int] = ()
    eager_sizes: Sequence[int] = ()
    device: torch.device = CPU


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
        self._is_on_device = context.plane.is_on_device
        device = context.device
        self._no_x = torch.empty(0, context.hidden_size, dtype=context.dtype, device=device)
        self._no_slots = torch.empty(0, context.top_k, dtype=torch.int64, device=device)
        self._no_weights = torch.empty(0, context.top_k, dtype=torch.float32, device=device)

    def run(self) -> None:
        """Step until the leader ends the view in good order."""
        with torch.inference_mode():
            while True:
                go = self.exchange()
                if go.stop:
                    return
                self.step(go)

    def capture(self) -> None:
        """Before ``run``: capture the graphs that decode steps of this rank will want, if any, and let other steps'
        kernels be compiled, so that no request waits for it."""
        graphs, half = self._c.graphs, cast("DeviceAttentionHalf | None", self._c.attention)
        if graphs is None:
            return
        with torch.inference_mode():
            for size in self._c.eager_sizes:
                if half is not None:
                    half.stage_chunk_of_nothing(size)
                graphs.rehearse(partial(self._pass, half, self._padded(size)))
            graphs.capture_all(reversed(self._c.graph_sizes), partial(self._pass_of_nothing, half))

    def close(self) -> None:
        """The view is over; to be called before its plane is closed."""
        if self._c.graphs is not None:
            self._c.graphs.close()

    def _pass_of_nothing(self, half: DeviceAttentionHalf | None, size: int) -> Callable[[], None]:
        if half is not None:
            half.stage_nothing(size)
        return partial(self._pass, half, self._padded(size))

    def _padded(self, size: int) -> list[int]:
        """By rank, the tokens of a step that is padded to a size."""
        return [size if rank.role in HOSTS_ATTENTION else 0 for rank in self._c.view.proto.ranks]

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
                ready.can_pad = self._can_pad(ready.num_tokens)
        return ready

    def _can_pad(self, num_tokens: int) -> bool:
        sizes, observer = self._c.graph_sizes, self._c.observer
        if not sizes or num_tokens > sizes[-1] or (observer is not None and observer.is_recording):
            return False
        return cast(DeviceAttentionHalf, self._c.attention).is_decode

    def step(self, go: mesh_pb2.StepGo) -> None:
        """Switch the layers whose migrations are due, then one forward pass of all layers.

        Raises:
            DataPlaneError: the view broke; nothing that a client can see has changed.
        """
        if go.commits and self._is_on_device and self._c.observer is not None:
            self._c.observer.flush_device(self._versions, cast(DeviceAttentionHalf, self._c.attention).routing)
        for traceparent in self._c.migrations.switch(go.commits, go.step):
            if self._c.attention is not None:
                self._c.attention.touched_by(traceparent, "migration")
        self._versions = self._c.migrations.view.versions
        tokens = list(go.num_tokens)
        if any(tokens):
            clock = self._c.clock
            traceparent = clock.start(go, self._c.view.rank)
            attention = self._c.attention if tokens[self._c.view.rank] else None
            if attention is not None and self._c.observer is not None:
                self._c.observer.begin()
            if self._is_on_device:
                self._pass_on_device(go, tokens)
            else:
                self._pass(attention, tokens)
            clock.attention_done()
            if attention is not None:
                if traceparent:
                    attention.rides_in(traceparent)
                attention.finish()
                self._commit(attention, tokens[self._c.view.rank])
            has_loads = traceparent and self._c.experts is not None
            clock.finish(sum(tokens), self._c.migrations.view.local_slots() if has_loads else {})
        elif self._is_on_device and self._c.attention is not None:
            self._commit(self._c.attention, 0)  # an idle tick: what the device has counted is fetched
        self._progress.step = go.step

    def _commit(self, attention: AttentionHalf, num_tokens: int) -> None:
        """The step of this rank's tokens counts from now on."""
        self._c.routing.commit()
        observer = self._c.observer
        if observer is None:
            return
        if self._is_on_device:
            observer.commit_on_device(self._versions, num_tokens, cast(DeviceAttentionHalf, attention).routing)
        else:
            observer.commit()

    def _pass(self, attention: AttentionHalf | None, tokens: list[int]) -> None:
        """All layers, from the tokens to what is sampled from."""
        if attention is not None:
            attention.begin()
        for layer in self._c.moe_layers:
            self._layer(layer, attention, tokens)

    def _pass_on_device(self, go: mesh_pb2.StepGo, tokens: list[int]) -> None:
        """Replay the graph of the step's size where there is one, or else enqueue the pass.

        A rank without tokens takes part in a padded step with padding alone: what a graph sends is static.
        """
        graphs, half = self._c.graphs, cast("DeviceAttentionHalf | None", self._c.attention)
        is_busy, size = bool(tokens[self._c.view.rank]), go.padded_tokens
        if not size:
            if half is not None and is_busy:
                half.stage(None)
            self._pass(half if is_busy else None, tokens)
            return
        if half is not None:
            if is_busy:
                half.stage(size)
            else:
                half.stage_nothing(size)
        if graphs is not None and graphs.has(size):
            graphs.replay(size)
        else:
            self._pass(half, self._padded(size))

    def _layer(self, layer: int, attention: AttentionHalf | None, tokens: list[int]) -> None:
        x_TH, slot_TK, weight_TK = self._no_x, self._no_slots, self._no_weights
        if attention is not None:
            x_TH, routes = attention.before_experts(layer)
            weight_TK = routes.weight_TK
            if routes.slot_TK is not None:
                slot_TK = routes.slot_TK
                if self._c.observer is not None:
                    self._c.observer.observe_on_device(routes.expert_TK)
            else:
                slot_TK = self._c.routing[layer].choose(routes.expert_TK)
                if self._c.observer is not None:
                    self._c.observer.observe(self._versions[layer], routes.expert_TK, slot_TK)
        self._c.clock.attention_done()
        limit = self._c.max_num_tokens
        if max(tokens) <= limit:
            out_TH = self._exchange(layer, x_TH, slot_TK, weight_TK, tokens, attention)
        else:
            out_TH = torch.cat(
                [
                    self._exchange(
                        layer,
                        x_TH[start : start + limit],
                        slot_TK[start : start + limit],
                        weight_TK[start : start + limit],
                        [min(limit, max(0, count - start)) for count in tokens],
                        attention if start == 0 else None,
                    )
                    for start in range(0, max(tokens), limit)
                ]
            )
        if attention is not None:
            attention.after_experts(layer, out_TH)

    def _exchange(
        self,
        layer: int,
        x_TH: torch.Tensor,
        slot_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        tokens: list[int],
        attention: AttentionHalf | None,
    ) -> torch.Tensor:
        """Dispatch, expert compute and combine of at most ``max_num_tokens`` tokens a rank.

        ``attention`` is told when the layer's tokens are on their way.
        """
        clock, plane = self._c.clock, self._c.plane
        exchange = Exchange(layer=layer, version=self._versions[layer], tokens=tokens, capacity=round_up(max(tokens)))
        pending = plane.dispatch(x_TH, slot_TK, weight_TK, exchange)
        if attention is not None:
            attention.while_dispatched(layer)
        dispatched: Dispatched[Any] = pending.wait()
        clock.dispatched(layer, dispatched.num_tokens, dispatched.counts_S)
        y_NH = dispatched.rows_NH
        if self._c.experts is not None and y_NH.shape[0]:
            y_NH = self._c.experts.compute(
                layer,
                y_NH,
                dispatched.counts_S,
                starts_S=dispatched.starts_S,
                expected_rows=dispatched.expected_rows,
                factor_N=dispatched.factor_N,
            )
        clock.computed()
        out_TH = plane.combine(y_NH, dispatched.handle).wait()
        clock.combined()
        return out_TH
