"""The slots of an expert server on a GPU: weights in one arena, and a table that says where each slot's are.

A migration fills spare rows of the arena; its commit changes table entries, in place and in the stream's order, so that
no weight is copied and CUDA graphs stay valid.

Dimensions: L MoE layers, S slots a layer, A rows of the arena, N rows, H hidden size, I width of an expert.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from expertmesh.expert_server.filling import EMPTY, check_placement
from expertmesh.expert_server.gpu_weights import Fp8, make_weights
from expertmesh.mesh.halves import ExpertWeights, SlotChange, StagingFullError
from expertmesh.mesh.model.checkpoint import READERS, Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Counter

log = logging.getLogger(__name__)

_NAN_ROW = 0
"""The arena's first row: where empty slots are, so that a row sent there by mistake can pass for no expert's answer."""


class GpuSlots:
    """An ``ExpertHalf`` over one arena, allocated once; ``gpu_weights`` says what lies in it."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        num_slots: int,
        slots_loaded: Counter,
        device: torch.device,
        *,
        spare: int,
        fp8: Fp8 = "off",
    ) -> None:
        """``slots_loaded`` counts slots that were filled from the checkpoint. ``spare``: rows for migrations.

        Raises:
            UserError: ``fp8`` is not for this checkpoint; see ``make_weights``.
        """
        self._spec = spec
        self._checkpoint = checkpoint
        self._num_slots = num_slots
        self._slots_loaded = slots_loaded
        num_layers = len(spec.moe_layers)
        num_rows = 1 + num_layers * num_slots + spare
        self._weights = make_weights(spec, checkpoint, num_rows, device, fp8)
        for part in self._arena_row(_NAN_ROW):
            part.fill_(torch.nan)
        self._table_LS = torch.full((num_layers, num_slots), _NAN_ROW, dtype=torch.int32, device=device)
        self._layer_index = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._held = {layer: [EMPTY] * num_slots for layer in spec.moe_layers}
        self._row = {layer: [_NAN_ROW] * num_slots for layer in spec.moe_layers}
        self._free = list(range(num_rows - 1, 0, -1))
        self._staged: dict[int, int] = {}  # address of staged gate_up -> the row that it gives back
        self._spare_left = spare
        self._lock = threading.Lock()

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def slots(self, layer: int) -> tuple[int, ...]:
        """The expert that each local slot of a layer holds, -1 = empty."""
        return tuple(self._held[layer])

    def rows(self, layer: int) -> list[int]:
        """The arena's row of each local slot of a layer, as the table on the device has it."""
        rows: list[int] = self._table_LS[self._layer_index[layer]].tolist()
        return rows

    def load(self, placement: Mapping[int, Sequence[int]]) -> None:
        """Make slot s of layer l hold expert ``placement[l][s]``; -1 = empty. What is there already is kept.

        Raises:
            ValueError: the placement is not one for this model and this many slots; nothing has changed.
            UserError: the checkpoint cannot be read; the slots concerned are empty.
        """
        check_placement(self._spec, self._num_slots, placement)
        started = time.monotonic()
        missing = [item for layer, wanted in placement.items() for item in self._rearrange(layer, wanted)]
        num_bytes = sum(self._checkpoint.expert_bytes(self._spec, layer, expert) for layer, _, expert in missing)
        progress = self._checkpoint.progress("experts", num_bytes)
        try:
            with progress, ThreadPoolExecutor(READERS, thread_name_prefix="expert-read") as pool:
                # Leaving the block waits for every read.
                for _ in pool.map(self._read, missing):
                    self._slots_loaded.add()
        finally:
            for layer in placement:
                self._write_table(layer)
        size_mb = len(missing) * sum(part.nbytes for part in self._arena_row(_NAN_ROW)) / 1e6
        log.info("loaded %d experts (%.1f MB) in %.3f s", len(missing), size_mb, time.monotonic() - started)

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
        """The experts' MLP on rows grouped by slot; see ``grouped_expert_mlp_gpu``. Returns y[N, H]."""
        return self._weights.compute(
            rows_NH,
            counts_S,
            self._table_LS[self._layer_index[layer]],
            starts_S=starts_S,
            factor_N=factor_N,
            expected_rows=expected_rows,
        )

    def memory(self) -> Sequence[torch.Tensor]:
        return self._weights.parts

    def reserve(self, num_experts: int) -> list[ExpertWeights]:
        with self._lock:
            if num_experts > self._spare_left:
                raise StagingFullError(f"{num_experts} experts to stage, but {self._spare_left} rows are spare")
            self._spare_left -= num_experts
            rows = [self._free.pop() for _ in range(num_experts)]
            staged = [self._arena_row(row) for row in rows]
            self._staged |= {weights[0].data_ptr(): row for weights, row in zip(staged, rows, strict=True)}
        return staged

    def release(self, staged: Sequence[ExpertWeights]) -> None:
        """Rows that went live stay; what they replaced is spare instead."""
        with self._lock:
            rows = [self._staged.pop(weights[0].data_ptr()) for weights in staged]
            self._free += [row for row in rows if row != _NAN_ROW]
            self._spare_left += len(staged)

    def read(self, layer: int, slot: int) -> ExpertWeights:
        """An expert's tensors of a slot, in the arena."""
        return self._arena_row(self._row[layer][slot])

    def fetch(self, layer: int, expert: int, into: ExpertWeights) -> None:
        """Read an expert into memory of ``reserve``; see ``Checkpoint.copy_expert`` for errors."""
        self._weights.fetch(layer, expert, into)

    def commit(self, layer: int, changes: Sequence[SlotChange]) -> None:
        """Point the slots at what was staged for them; emptied ones at NaN."""
        rows, held = self._row[layer], self._held[layer]
        with self._lock:
            for change in changes:
                old = rows[change.slot]
                if change.weights is None:
                    rows[change.slot] = _NAN_ROW
                    self._free.append(old)
                else:
                    address = change.weights[0].data_ptr()
                    rows[change.slot] = self._staged[address]
                    self._staged[address] = old
                held[change.slot] = change.expert
        self._write_table(layer)

    def _arena_row(self, row: int) -> ExpertWeights:
        return tuple(part[row] for part in self._weights.parts)

    def _write_table(self, layer: int) -> None:
        # Not waited for: a step that runs still reads the old entries, and the next one is enqueued behind this.
        row_S = torch.tensor(self._row[layer], dtype=torch.int32)
        self._table_LS[self._layer_index[layer]].copy_(row_S, non_blocking=True)

    def _rearrange(self, layer: int, wanted: Sequence[int]) -> list[tuple[int, int, int]]:
        """Keep the rows of experts that stay, free the others; returns (layer, slot, expert) to read."""
        homes = dict(zip(self._held[layer], self._row[layer], strict=True))
        kept = [homes.get(expert, _NAN_ROW) if expert != EMPTY else _NAN_ROW for expert in wanted]
        with self._lock:
            self._free += [row for row in self._row[layer] if row != _NAN_ROW and row not in kept]
        self._row[layer] = kept
        self._held[layer] = [expert if row != _NAN_ROW else EMPTY for expert, row in zip(wanted, kept, strict=True)]
        return [(layer, slot, expert) for slot, expert in enumerate(wanted) if self._held[layer][slot] != expert]

    def _read(self, item: tuple[int, int, int]) -> None:
        layer, slot, expert = item
        with self._lock:
            row = self._free.pop()
        try:
            self._weights.fetch(layer, expert, self._arena_row(row))
        except BaseException:
            with self._lock:
                self._free.append(row)
            raise
        self._row[layer][slot], self._held[layer][slot] = row, expert
