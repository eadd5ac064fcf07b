"""Experts with biases and another activation: what a slot computes of them, and that all their parts move together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmesh.expert_server.filling import EMPTY
from expertmesh.expert_server.slots import Slots
from expertmesh.kernels.grouped_mlp import ExpertKind, variant_expert_mlp
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.halves import SlotChange
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.telemetry import disabled_telemetry
from support.families import write_family_checkpoint

COUNTS = [3, 0, 5, 1]


def one_expert(x_H: torch.Tensor, parts: list[torch.Tensor], limit: float, alpha: float) -> torch.Tensor:
    """The formula of gpt-oss, row by row."""
    gate_up_FH, down_HI, gate_up_bias_F, down_bias_H = parts
    hidden = [float(row @ x_H + bias) for row, bias in zip(gate_up_FH, gate_up_bias_F, strict=True)]
    width = len(hidden) // 2
    gated = []
    for gate, up in zip(hidden[:width], hidden[width:], strict=True):
        gate = min(gate, limit)
        up = max(-limit, min(up, limit))
        gated.append((up + 1) * gate / (1 + torch.exp(torch.tensor(-alpha * gate, dtype=torch.float64)).item()))
    return down_HI @ torch.tensor(gated, dtype=torch.float64) + down_bias_H


@pytest.mark.parametrize(("hidden", "width"), [(16, 8), (10, 7)], ids=["grouped", "padded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_clamped_activation_and_biases(hidden: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows_NH = draw(sum(COUNTS), hidden)
    parts = [draw(4, 2 * width, hidden), draw(4, hidden, width), draw(4, 2 * width), draw(4, hidden)]
    kind = ExpertKind(limit=1.5, alpha=1.7, gate_up_bias_SF=parts[2], down_bias_SH=parts[3])
    y_NH = variant_expert_mlp(rows_NH, torch.tensor(COUNTS), parts[0], parts[1], kind)
    slots = [slot for slot, count in enumerate(COUNTS) for _ in range(count)]
    expected = [
        one_expert(row.double(), [part[slot].double() for part in parts], 1.5, 1.7)
        for row, slot in zip(rows_NH, slots, strict=True)
    ]
    torch.testing.assert_close(y_NH.double(), torch.stack(expected), rtol=tolerance, atol=10 * tolerance)


def test_all_parts_of_an_expert_move_together(tmp_path: Path) -> None:
    path = write_family_checkpoint(tmp_path / "model", "gpt_oss")
    spec, checkpoint = load_spec(ModelConfig(path=path)), Checkpoint(path)
    slots = Slots(spec, checkpoint, 4, disabled_telemetry().metrics.slots_loaded)
    slots.load({layer: [0, 1, 2, EMPTY] for layer in spec.moe_layers})
    slots.load({layer: [1, 0, EMPTY, 2] for layer in spec.moe_layers})
    (staged,) = slots.reserve(1)
    slots.fetch(1, 5, staged)
    slots.commit(1, [SlotChange(2, 5, staged), SlotChange(0, EMPTY, None)])
    held = {0: (1, 0, EMPTY, 2), 1: (EMPTY, 0, 5, 2)}
    for layer, experts in held.items():
        assert slots.slots(layer) == experts
        for slot, expert in enumerate(experts):
            parts = slots.read(layer, slot)
            assert [tuple(part.shape) for part in parts] == list(spec.expert_shapes)
            if expert == EMPTY:
                assert all(part.isnan().all() for part in parts)
            else:
                wanted = checkpoint.expert(spec, layer, expert)
                assert all(torch.equal(part, other) for part, other in zip(parts, wanted, strict=True))
