"""The one step loop: what every rank of a view does, whatever its role.

For each step the ranks agree in lockstep, then pass through all MoE layers together: attention halves compute up to
the experts, the data plane dispatches, expert halves compute, the data plane combines. A rank without one of the
halves, or without tokens, takes part with nothing. On a device the pass through the layers is captured into a CUDA
graph for each size of decode steps and of small steps with prompts, and replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch

from expertmesh.mesh.dataplane import DataPlane
from expertmesh.mesh.device import CPU
from expertmesh.mesh.graphs import StepGraphs
from expertmesh.mesh.halves import AttentionHalf, DeviceAttentionHalf, ExpertHalf
from expertmesh.mesh.layerwork import LayerWork
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.migration import Migrations
from expertmesh.mesh.padding import MICRO_BATCHES, PaddedStep, StepSizes, announced, round_up_chunks
from expertmesh.mesh.pingpong import PingPong
from expertmesh.mesh.placement import RoutingTables
from expertmesh.mesh.reporting import RoutingObserver
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.view import HOSTS_ATTENTION, ViewInfo
from expertmesh.v1 import mesh_pb2


@dataclass(frozen=True, kw_only=True)
class LoopContext:
    """What the loop of one view works with. ``view`` is as it began; its placements may be switched since.

    With a device plane the attention half is a ``DeviceAttentionHalf``, and steps are padded to ``sizes``; on a GPU
    ``graphs`` hold these steps.
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
    sizes: StepSizes = field(default_factory=StepSizes)
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
        self._work = LayerWork(context)
        self._ping_pong = PingPong(self._work, context.plane, context.clock, context.view)

    def run(self) -> None:
        """Step until the leader ends the view in good order."""
        with torch.inference_mode():
            while True:
                go = self.exchange()
                if go.stop:
                    return
                self.step(go)

    def capture(self) -> None:
        """Before ``run``: capture the graphs that steps of this rank will want, if any, and let other steps' kernels be
        compiled, so that no request waits for it."""
        graphs, half = self._c.graphs, cast("DeviceAttentionHalf | None", self._c.attention)
        if graphs is None:
            return
        with torch.inference_mode():
            for size in self._c.sizes.eager:
                if half is not None:
                    half.stage_chunk_of_nothing(size)
                graphs.rehearse(partial(self._pass, half, self._tokens_in(PaddedStep(size))))
            graphs.capture_all(self._captured(), partial(self._pass_of_nothing, half))

    def close(self) -> None:
        """The view is over; to be called before its plane is closed."""
        if self._c.graphs is not None:
            self._c.graphs.close()

    def _captured(self) -> list[PaddedStep]:
        """The steps that graphs hold, largest first."""
        sizes = self._c.sizes
        whole = sizes.decode[:1] if sizes.split else sizes.decode  # what has more than one token a rank is split
        steps = [PaddedStep(size, has_chunks=True) for size in sizes.chunks]
        steps += [PaddedStep(size, MICRO_BATCHES) for size in sizes.split] + [PaddedStep(size) for size in whole]
        return sorted(steps, key=lambda step: -step.size * step.micro_batches)

    def _pass_of_nothing(self, half: DeviceAttentionHalf | None, padded: PaddedStep) -> Callable[[], None]:
        if half is not None:
            half.stage_nothing(padded)
        return partial(self._pass, half, self._tokens_in(padded))

    def _tokens_in(self, padded: PaddedStep) -> list[list[int]]:
        """By micro-batch and rank."""
        counts = [padded.size if rank.role in HOSTS_ATTENTION else 0 for rank in self._c.view.proto.ranks]
        return [counts] * padded.micro_batches

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
                ready.first_tokens = self._c.attention.first_tokens
                if not self._is_recording:
                    ready.can_pad = self._can_pad(ready.num_tokens)
                    ready.can_pad_chunks = self._can_pad_chunks(ready.num_tokens)
        return ready

    @property
    def _is_recording(self) -> bool:
        return self._c.observer is not None and self._c.observer.is_recording

    def _can_pad(self, num_tokens: int) -> bool:
        sizes = self._c.sizes.decode
        return bool(sizes) and num_tokens <= sizes[-1] and cast(DeviceAttentionHalf, self._c.attention).is_decode

    def _can_pad_chunks(self, num_tokens: int) -> bool:
        sizes = self._c.sizes.chunks
        if not sizes or num_tokens > sizes[-1]:
            return False
        padded = PaddedStep(round_up_chunks(num_tokens), has_chunks=True)
        return cast(DeviceAttentionHalf, self._c.attention).fits(padded)

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
        self._versions = self._work.versions = self._c.migrations.view.versions
        tokens = list(go.num_tokens)
        if any(tokens):
            clock = self._c.clock
            traceparent = clock.start(go, self._c.view.rank)
            attention = self._c.attention if tokens[self._c.view.rank] else None
            if attention is not None and self._c.observer is not None:
                self._c.observer.begin()
            if self._is_on_device:
                self._pass_on_device(go)
            else:
                self._pass(attention, tokens_of(go))
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

    def _pass(self, attention: AttentionHalf | None, tokens: Sequence[Sequence[int]]) -> None:
        """All layers, from the tokens to what is sampled from; ``tokens`` by micro-batch and rank."""
        own = attention.micro_batches if attention is not None else ()
        batches = [own[index] if index < len(own) else None for index in range(len(tokens))]
        if len(tokens) > 1 and max(max(counts) for counts in tokens) <= self._c.max_num_tokens:
            self._ping_pong.run(self._c.moe_layers, batches, tokens)
            return
        # One batch, or two of which one takes several exchanges, each of which is waited for.
        for batch in batches:
            if batch is not None:
                batch.begin()
        for layer in self._c.moe_layers:
            for index, batch in enumerate(batches):
                self._work.whole(layer, batch, tokens[index], goes_on=index > 0)

    def _pass_on_device(self, go: mesh_pb2.StepGo) -> None:
        """Replay the step's graph where there is one, or else enqueue the pass.

        A rank without tokens takes part in a padded step with padding alone: what a graph sends is static.
        """
        graphs, half = self._c.graphs, cast("DeviceAttentionHalf | None", self._c.attention)
        is_busy, padded = bool(go.num_tokens[self._c.view.rank]), announced(go)
        if padded is None:
            if half is not None and is_busy:
                half.stage(None)
            self._pass(half if is_busy else None, tokens_of(go))
            return
        if half is not None:
            if is_busy:
                half.stage(padded)
            else:
                half.stage_nothing(padded)
        if graphs is not None and graphs.has(padded):
            graphs.replay(padded)
        else:
            self._pass(half, self._tokens_in(padded))


def tokens_of(go: mesh_pb2.StepGo) -> list[list[int]]:
    """The tokens of a step by micro-batch and rank; where it is not split there is one."""
    if not go.first_tokens:
        return [list(go.num_tokens)]
    rest = [count - first for count, first in zip(go.num_tokens, go.first_tokens, strict=True)]
    return [list(go.first_tokens), rest]
