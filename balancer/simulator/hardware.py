"""The constants of the serving simulator, each with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from expertmesh.mesh.errors import UserError

GPU = "measured on one H200 by benchmarks/hardware.py (benchmarks/results/hardware.json)"
DECODE = "measured on one H200 by benchmarks/gpu/decode.py (benchmarks/results/gpu_decode.json)"
FITTED = "fitted, layer_us and step_us together, to decode steps of one H200 (benchmarks/results/gpu_decode.json)"
DEEPEP = "measured: DeepEP V2 round trips of two H200s over NVLink, bf16, in a CUDA graph (docs/simulator.md)"


def _constant(default: float, source: str) -> Any:
    return field(default=default, metadata={"source": source})


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A GPU and its links. Sources that begin with ``assumed`` are nobody's measurement: replace them by yours.

    Args:
        memory_gb: of one GPU, 10^9 bytes; ``memory_share`` of it may hold weights and KV cache.
        memory_read_tb_per_s: dense weights and KV cache.
        expert_read_tb_per_s: expert weights in a grouped matrix product.
        matmul_tflop_per_s: every matrix product that is not bound by reading.
        exchange_gb_per_s: one GPU's bytes of dispatch and combine together, inside a node.
        exchange_us: a dispatch and a combine of next to nothing, inside a node.
        rdma_gb_per_s: one GPU's share of its node's network, each way.
        rdma_us: what a dispatch and a combine between nodes take longer.
        layer_us: of every layer, beside the matrix products, attention and exchanges.
        step_us: of every step: scheduling, sampling, agreeing on the next step.
    """

    memory_gb: float = _constant(141.0, "data sheet of the H200")
    memory_share: float = _constant(0.9, "assumed, the default of common engines")
    memory_read_tb_per_s: float = _constant(4.37, GPU)
    expert_read_tb_per_s: float = _constant(4.2, DECODE + ", the expert MLPs of steps with 64 requests")
    matmul_tflop_per_s: float = _constant(700.0, GPU + ", bf16; the sizes tried gave 670 to 780")
    exchange_gb_per_s: float = _constant(281.0, DEEPEP + ", slope from 512 to 4096 tokens")
    exchange_us: float = _constant(25.0, DEEPEP + ", 24 to 28 at 8 tokens")
    rdma_gb_per_s: float = _constant(50.0, "assumed: 400 Gb/s a GPU at line rate")
    rdma_us: float = _constant(50.0, "assumed")
    layer_us: float = _constant(23.0, FITTED)
    step_us: float = _constant(500.0, FITTED)

    @staticmethod
    def sources() -> dict[str, str]:
        """Constant → where its default comes from."""
        return {constant.name: str(constant.metadata["source"]) for constant in fields(Hardware)}

    def described(self) -> dict[str, dict[str, Any]]:
        """Constant → ``value`` and ``source``; one that differs from its default was given."""
        return {
            constant.name: {
                "value": getattr(self, constant.name),
                "source": constant.metadata["source"] if getattr(self, constant.name) == constant.default else "given",
            }
            for constant in fields(self)
        }

    def with_settings(self, settings: Sequence[str]) -> Hardware:
        """Some constants replaced by ``KEY=VALUE``.

        Raises:
            UserError: there is no such constant, or the value is no positive number; ``rdma_us``, ``layer_us`` and
                ``step_us`` may be 0, ``memory_share`` is at most 1.
        """
        changes: dict[str, float] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in self.sources():
                known = ", ".join(self.sources())
                raise UserError("--set", f"{setting!r} names no constant", f"give KEY=VALUE with one of {known}")
            changes[name] = _positive(name, text)
        return replace(self, **changes)


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and (value > 0 or (value == 0 and name in ("rdma_us", "layer_us", "step_us"))):
        if name != "memory_share" or value <= 1:
            return value
        raise UserError(f"--set {name}", f"{text} is more than all memory", "give a share above 0, at most 1")
    raise UserError(f"--set {name}", f"{text!r} is no positive number", f"give {name}=NUMBER in the unit of its name")
