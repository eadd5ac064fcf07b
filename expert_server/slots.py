"""The slots of an expert server: which expert each one holds, and the weights.

Dimensions: L MoE layers, S slots a layer, N rows, H hidden size, I width of an expert.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from expertmesh.expert_server.filling import EMPTY, check_placement
from expertmesh.expert_server.staging import Staging
from expertmesh.kernels.grouped_mlp import ExpertKind, grouped_expert_mlp, variant_expert_mlp
from expertmesh.mesh.halves import ExpertWeights, SlotChange
from expertmesh.mesh.model.architecture import ExpertVariant
from expertmesh.mesh.model.checkpoint import READERS, Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Counter

log = logging.getLogger(__name__)


class Slots:
    """An ``ExpertHalf`` over one weight arena, ``gate_up[L, S, 2I, H]`` and ``down[L, S, H, I]``, allocated once.

    Experts with biases have theirs beside, ``[L, S, 2I]`` and ``[L, S, H]``.

    An empty slot is filled with NaN: a row sent there by mistake can never pass for an expert's answer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        num_slots: int,
        slots_loaded: Counter,
        *,
        layers_at_a_time: int = 1,
    ) -> None:
        """``slots_loaded`` counts slots filled from the checkpoint; so many layers may migrate at a time."""
        self._spec = spec
        self._checkpoint = checkpoint
        self._num_slots = num_slots
        self._slots_loaded = slots_loaded
        self.staging = Staging(spec, num_slots * layers_at_a_time)
        self._row_of_layer = {layer: row for row, layer in enumerate(spec.moe_layers)}
        self._held = {layer: [EMPTY] * num_slots for layer in spec.moe_layers}
        leading = (len(spec.moe_layers), num_slots)
        self._arena = [torch.full((*leading, *shape), torch.nan, dtype=spec.dtype) for shape in spec.expert_shapes]

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def slots(self, layer: int) -> tuple[int, ...]:
        """The expert that each local slot of a layer holds, -1 = empty."""
        return tuple(self._held[layer])

    def load(self, placement: Mapping[int, Sequence[int]]) -> None:
        """Make slot s of layer l hold expert ``placement[l][s]``; -1 = empty. What is there already is kept or moved.

        Raises:
            ValueError: the placement is not one for this model and this many slots; nothing has changed.
            UserError: the checkpoint cannot be read; the slots concerned are empty.
        """
        check_placement(self._spec, self._num_slots, placement)
        started = time.monotonic()
        missing = [
            (layer, slot, expert)
            for layer, wanted in placement.items()
            for slot, expert in self._rearrange(layer, wanted)
        ]
        if missing:
            num_bytes = sum(self._checkpoint.expert_bytes(self._spec, layer, expert) for layer, _, expert in missing)
            progress = self._checkpoint.progress("experts", num_bytes)
            with progress, ThreadPoolExecutor(READERS, thread_name_prefix="expert-read") as pool:
                # Leaving the block waits for every read, so no thread writes to the arena after an error rose here.
                for _ in pool.map(self._read, missing):
                    self._slots_loaded.add()
        log.info(
            "loaded %d experts (%.1f MB) in %.3f s",
            len(missing),
            len(missing) * self._spec.bytes_per_expert / 1e6,
            time.monotonic() - started,
        )

    def compute(
        self,
        layer: int,
        rows_NH: torch.Tensor,
        counts_S: torch.Tensor,
        *,
        starts_S: torch.Tensor | None = None,
        expected_rows: float | None = None,
        factor_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts' MLP on rows grouped by slot; see ``grouped_expert_mlp``. Returns y[N, H]."""
        assert starts_S is None, "host planes leave no gaps between slots"
        assert factor_N is None, "host planes multiply rows by their factors themselves"
        row, variant = self._row_of_layer[layer], self._spec.expert
        gate_up_SFH, down_SHI, *biases = (part[row] for part in self._arena)
        if variant == ExpertVariant():
            return grouped_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI)
        gate_up_bias_SF, down_bias_SH = biases or (None, None)
        kind = ExpertKind(
            limit=variant.limit, alpha=variant.alpha, gate_up_bias_SF=gate_up_bias_SF, down_bias_SH=down_bias_SH
        )
        return variant_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI, kind)

    def memory(self) -> Sequence[torch.Tensor]:
        return (*self._arena, *self.staging.memory())

    def reserve(self, num_experts: int) -> list[ExpertWeights]:
        return self.staging.reserve(num_experts)

    def release(self, staged: Sequence[ExpertWeights]) -> None:
        self.staging.release(staged)

    def read(self, layer: int, slot: int) -> ExpertWeights:
        """The tensors of ``ModelSpec.expert_shapes`` of a slot, in the arena."""
        row = self._row_of_layer[layer]
        return tuple(part[row, slot] for part in self._arena)

    def fetch(self, layer: int, expert: int, into: ExpertWeights) -> None:
        """Read an expert from the checkpoint into memory of ``reserve``; see ``Checkpoint.copy_expert`` for errors."""
        self._checkpoint.copy_expert(self._spec, layer, expert, *into)

    def commit(self, layer: int, changes: Sequence[SlotChange]) -> None:
        """Copy what was staged into the slots; emptied slots get NaN."""
        held = self._held[layer]
        for change in changes:
            parts = self.read(layer, change.slot)
            if change.weights is None:
                for part in parts:
                    part.fill_(torch.nan)
            else:
                for part, staged in zip(parts, change.weights, strict=True):
                    part.copy_(staged)
            held[change.slot] = change.expert

    def _rearrange(self, layer: int, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Fill slots whose expert is in another slot, empty the others that change; returns (slot, expert) to read."""
        row, held = self._row_of_layer[layer], self._held[layer]
        source_of = {expert: slot for slot, expert in enumerate(held) if expert != EMPTY}
        changes = [(slot, expert) for slot, expert in enumerate(wanted) if held[slot] != expert]
        moves = [(slot, expert) for slot, expert in changes if expert in source_of]
        blank = [slot for slot, expert in changes if expert not in source_of]
        sources = [source_of[expert] for _, expert in moves]
        targets = [slot for slot, _ in moves]
        for weights in (part[row] for part in self._arena):
            # Indexing by a list copies, so all sources are read before a target is overwritten: swaps are safe.
            weights[targets] = weights[sources]
            weights[blank] = torch.nan
        for slot, expert in changes:
            held[slot] = expert if expert in source_of else EMPTY
        return [(slot, wanted[slot]) for slot in blank if wanted[slot] != EMPTY]

    def _read(self, item: tuple[int, int, int]) -> None:
        layer, slot, expert = item
        self._checkpoint.copy_expert(self._spec, layer, expert, *self.read(layer, slot))
        self._held[layer][slot] = expert
