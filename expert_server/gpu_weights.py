"""How experts lie in a GPU's memory, and the MLP over them: floats of the model's dtype, or float8 with scales.

Dimensions: A rows of the arena, N rows, S slots; of float8 weights see ``grouped_mlp_fp8``.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypedDict, Unpack

import torch

from expertmesh.kernels.fp8_rows import BLOCK
from expertmesh.kernels.grouped_mlp_fp8 import SIZE_MULTIPLE, Fp8Experts, grouped_expert_mlp_fp8, scale_shapes
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec

Fp8 = Literal["off", "weights", "activations"]


class Rows(TypedDict):
    """What is known of the rows beside their counts; see ``grouped_expert_mlp_gpu``."""

    starts_S: torch.Tensor | None
    expected_rows: float | None
    factor_N: torch.Tensor | None


class GpuWeights(Protocol):
    """The arena of a kind of experts."""

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """An expert's tensors, each with the rows of the arena in front."""

    def fetch(self, layer: int, expert: int, into: ExpertWeights) -> None:
        """Read an expert; see ``Checkpoint.copy_expert`` for errors."""

    def compute(
        self,
        rows_NH: torch.Tensor,
        counts_S: torch.Tensor,
        table_S: torch.Tensor,
        **rows: Unpack[Rows],
    ) -> torch.Tensor:
        """The MLP on rows grouped by slot, whose experts are where the table says. Returns y[N, H]."""


class FloatWeights:
    """``gate_up[A, 2I, H]`` and ``down[A, H, I]`` in the model's dtype."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, num_rows: int, device: torch.device) -> None:
        self._spec, self._checkpoint = spec, checkpoint
        gate_up, down = spec.expert_shapes
        self._gate_up_AFH = torch.empty(num_rows, *gate_up, dtype=spec.dtype, device=device)
        self._down_AHI = torch.empty(num_rows, *down, dtype=spec.dtype, device=device)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return self._gate_up_AFH, self._down_AHI

    def fetch(self, layer: int, expert: int, into: ExpertWeights) -> None:
        self._checkpoint.copy_expert(self._spec, layer, expert, *into)

    def compute(
        self,
        rows_NH: torch.Tensor,
        counts_S: torch.Tensor,
        table_S: torch.Tensor,
        **rows: Unpack[Rows],
    ) -> torch.Tensor:
        return grouped_expert_mlp_gpu(
            rows_NH,
            counts_S,
            self._gate_up_AFH,
            self._down_AHI,
            table_S=table_S,
            **rows,
        )


class Fp8Weights:
    """Experts of an FP8 checkpoint as they are stored, half the memory and the reads of bfloat16."""

    def __init__(
        self, spec: ModelSpec, checkpoint: Checkpoint, num_rows: int, device: torch.device, *, rounds_rows: bool
    ) -> None:
        """``rounds_rows``: what goes into each product is rounded to float8 as well."""
        self._spec, self._checkpoint, self._rounds_rows = spec, checkpoint, rounds_rows
        gate_up, down = spec.expert_shapes
        gate_up_scale, down_scale = scale_shapes(spec.hidden_size, spec.moe_intermediate_size)
        self._experts = Fp8Experts(
            gate_up_AFH=torch.empty(num_rows, *gate_up, dtype=torch.float8_e4m3fn, device=device),
            down_AHI=torch.empty(num_rows, *down, dtype=torch.float8_e4m3fn, device=device),
            gate_up_scale_A2YX=torch.empty(num_rows, *gate_up_scale, device=device),
            down_scale_AXY=torch.empty(num_rows, *down_scale, device=device),
        )

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        own = self._experts
        return own.gate_up_AFH, own.down_AHI, own.gate_up_scale_A2YX, own.down_scale_AXY

    def fetch(self, layer: int, expert: int, into: ExpertWeights) -> None:
        self._checkpoint.copy_fp8_expert(self._spec, layer, expert, *into)

    def compute(
        self,
        rows_NH: torch.Tensor,
        counts_S: torch.Tensor,
        table_S: torch.Tensor,
        **rows: Unpack[Rows],
    ) -> torch.Tensor:
        return grouped_expert_mlp_fp8(
            rows_NH,
            counts_S,
            self._experts,
            table_S=table_S,
            **rows,
            rounds_rows=self._rounds_rows,
        )


def make_weights(spec: ModelSpec, checkpoint: Checkpoint, num_rows: int, device: torch.device, fp8: Fp8) -> GpuWeights:
    """The arena that ``expert.fp8`` asks for, uninitialised.

    Raises:
        UserError: ``fp8`` is on and the checkpoint's experts are not stored so, or of sizes that the kernels do not
            take, or the model computes in another dtype than bfloat16.
    """
    if fp8 == "off":
        return FloatWeights(spec, checkpoint, num_rows, device)
    multiple = BLOCK if fp8 == "activations" else SIZE_MULTIPLE
    sizes = spec.hidden_size, spec.moe_intermediate_size
    if spec.dtype is not torch.bfloat16:
        problem, remedy = f"and model.dtype is {spec.dtype_name}", "set model.dtype: bfloat16, or expert.fp8: off"
    elif any(size % multiple for size in sizes):
        problem = f"and {spec.name}'s hidden size and expert width, {sizes}, are no multiples of {multiple}"
        remedy = "set expert.fp8: off"
    elif not checkpoint.stores_fp8_experts(spec):
        problem, remedy = (
            f"and {spec.name} does not store its experts in FP8",
            "set expert.fp8: off, or serve one that does",
        )
    else:
        return Fp8Weights(spec, checkpoint, num_rows, device, rounds_rows=fp8 == "activations")
    raise UserError("expert.fp8", f"is {fp8}, {problem}", remedy)
