"""How long one step of the mesh takes.

All ranks make a step in lockstep, and layer after layer: the slowest attention rank, then the exchanges and the slowest
expert rank. Nothing overlaps.

Dimensions: A attention ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.expert_time import ExpertTimes
from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import ModelShape

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWork:
    """What attention ranks do in a step, int64 [A] each.

    Args:
        tokens_A: all tokens of the rank.
        sampled_A: those of them that the LM head sees.
        context_A: tokens that decoding tokens look back at, summed.
        pairs_A: (prompt token, token before it) of prompt tokens, summed.
    """

    tokens_A: Ints
    sampled_A: Ints
    context_A: Ints
    pairs_A: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshTime:
    """Seconds of the parts of steps that do not depend on the context."""

    experts_s: float
    exchange_s: float
    fixed_s: float

    @property
    def total_s(self) -> float:
        return self.experts_s + self.exchange_s + self.fixed_s


class StepTime:
    """The cost model of one model on one kind of GPU under one placement."""

    def __init__(self, shape: ModelShape, hardware: Hardware, expert_times: ExpertTimes) -> None:
        read, flops = hardware.memory_read_tb_per_s * 1e12, hardware.matmul_tflop_per_s * 1e12
        self._expert_times = expert_times
        self._fixed_s = hardware.step_us * 1e-6 + shape.num_layers * hardware.layer_us * 1e-6
        self._dense_read_s = shape.dense_params * shape.weight_bytes / read
        self._dense_token_s = 2 * shape.dense_params / flops
        self._head_read_s = shape.head_params * shape.weight_bytes / read
        self._head_token_s = 2 * shape.head_params / flops
        self.context_token_s = shape.num_layers * max(shape.kv_bytes / read, shape.decode_flops / flops)
        self._pair_s = shape.num_layers * shape.prefill_flops / flops

    def attention(self, work: AttentionWork) -> Floats:
        """Seconds of each attention rank [A], summed over the layers: weights read or multiplied, whichever takes
        longer, and the context."""
        dense_A = np.where(work.tokens_A > 0, np.maximum(self._dense_read_s, work.tokens_A * self._dense_token_s), 0.0)
        head_A = np.where(work.sampled_A > 0, np.maximum(self._head_read_s, work.sampled_A * self._head_token_s), 0.0)
        seconds_A: Floats = dense_A + head_A + work.context_A * self.context_token_s + work.pairs_A * self._pair_s
        return seconds_A

    def mesh(self, tokens: int, busiest: int) -> MeshTime:
        """``busiest``: the most tokens of one attention rank."""
        return MeshTime(
            experts_s=self._expert_times.experts(tokens),
            exchange_s=self._expert_times.exchange(tokens, busiest),
            fixed_s=self._fixed_s,
        )
