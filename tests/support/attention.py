"""An attention half run in process, with plain-torch experts in the place of the mesh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from expertmesh.attention_server.half import ServingHalf
from expertmesh.attention_server.sampler import Sampled, Sampler
from expertmesh.expert_server.slots import Slots
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.config_speculation import SpeculationConfig
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry, disabled_telemetry
from support.engine_driver import EngineDriver


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Threads that spin for one another make tiny products a hundred times slower when the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(sampler: Sampler, logits_SV: torch.Tensor, rows_S: np.ndarray, position_S: np.ndarray) -> Sampled:
    """Choose the next token of each sequence and accept it, as an engine does."""
    sampled = sampler.choose(logits_SV, rows_S, position_S)
    sampler.accept(rows_S, sampled.tokens)
    return sampled


class PlainExperts:
    """The routed experts of a model, one after the other."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self._weights = {
            (layer, expert): checkpoint.expert(spec, layer, expert)
            for layer in spec.moe_layers
            for expert in range(spec.num_experts)
        }

    def compute(self, layer: int, x_TH: torch.Tensor, routes: Routes) -> torch.Tensor:
        out_TH = torch.zeros_like(x_TH)
        for expert in sorted(set(routes.expert_TK.flatten().tolist())):
            gate_up, down = self._weights[layer, expert]
            token, choice = torch.where(routes.expert_TK == expert)
            gate, up = F.linear(x_TH[token], gate_up).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down) * routes.weight_TK[token, choice, None].to(x_TH.dtype)
            out_TH.index_add_(0, token, y)
        return out_TH


class SlotExperts:
    """The routed experts of a model as an expert server computes them: one slot for each."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self._slots = Slots(spec, checkpoint, spec.num_experts, disabled_telemetry().metrics.slots_loaded)
        self._slots.load({layer: list(range(spec.num_experts)) for layer in spec.moe_layers})

    def compute(self, layer: int, x_TH: torch.Tensor, routes: Routes) -> torch.Tensor:
        num_choices = routes.expert_TK.shape[1]
        order = routes.expert_TK.flatten().argsort(stable=True)
        token = order // num_choices
        counts_S = routes.expert_TK.flatten().bincount(minlength=self._slots.num_slots)
        y_NH = self._slots.compute(layer, x_TH[token], counts_S)
        out_TH = torch.zeros_like(x_TH)
        return out_TH.index_add_(0, token, y_NH * routes.weight_TK.flatten()[order, None].to(x_TH.dtype))


class LocalEngine(EngineDriver):
    """A half with everything a step needs."""

    half: ServingHalf

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        experts: PlainExperts | SlotExperts,
        now: list[float] | None = None,
        telemetry: Telemetry | None = None,
        speculation: dict[str, Any] | None = None,
        micro_batches: int = 1,
        **config: Any,
    ) -> None:
        super().__init__(spec, now)
        self._experts = experts
        self.half = ServingHalf(
            AttentionConfig(**config),
            spec,
            checkpoint,
            telemetry or disabled_telemetry(),
            step_sample_interval_s=1.0,
            clock=lambda: self.now[0],
            speculation=SpeculationConfig(**speculation or {}),
            micro_batches=micro_batches,
        )
        self._listen()

    def forward(self, layers: Iterable[int] | None = None) -> None:
        """``begin`` and the MoE layers of a step (the first ones, for a step that breaks), micro-batches in turns."""
        for batch in self.half.micro_batches:
            batch.begin()
        for layer in self.spec.moe_layers if layers is None else layers:
            outs = []
            for batch in self.half.micro_batches:
                x_TH, routes = batch.before_experts(layer)
                batch.while_dispatched(layer)
                outs.append(self._experts.compute(layer, x_TH, routes))
            for batch, out_TH in zip(self.half.micro_batches, outs, strict=True):
                batch.after_experts(layer, out_TH)

    def run_with_breaks(self) -> None:
        """As ``run``, but each step breaks at every layer before it is completed."""
        layers = self.spec.moe_layers
        while self.half.prepare():
            for broken in range(len(layers)):
                self.forward(layers[:broken])
            assert self.half.prepare() > 0
            self.forward()
            self.half.finish()

    def step(self) -> int:
        """One step; returns its tokens."""
        num_tokens = self.half.prepare()
        if num_tokens:
            self.forward()
            self.half.finish()
        return num_tokens
