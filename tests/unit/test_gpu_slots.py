"""Slots behind a table: which weights the table leads to, through loads, migrations and their failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmesh.expert_server.gpu_slots import GpuSlots
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.halves import SlotChange, StagingFullError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.model.weights import DummyCheckpoint
from expertmesh.mesh.telemetry import disabled_telemetry
from support.checkpoints import write_checkpoint

NUM_SLOTS = 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", mlp_only_layers=[0])


def make_slots(path: Path, spare: int = 2) -> tuple[GpuSlots, ModelSpec]:
    spec = load_spec(ModelConfig(path=path))
    loaded = disabled_telemetry().metrics.slots_loaded
    return GpuSlots(spec, Checkpoint(path), NUM_SLOTS, loaded, torch.device("cpu"), spare=spare), spec


def check(slots: GpuSlots, spec: ModelSpec, path: Path) -> None:
    """Every slot leads to its expert's weights, an empty one to NaN, no two to the same row."""
    checkpoint = Checkpoint(path)
    for layer in spec.moe_layers:
        rows = slots.rows(layer)
        held = [row for row, expert in zip(rows, slots.slots(layer), strict=True) if expert >= 0]
        assert len(set(held)) == len(held)
        for slot, expert in enumerate(slots.slots(layer)):
            parts = slots.read(layer, slot)
            if expert < 0:
                assert all(part.isnan().all() for part in parts)
            else:
                for part, wanted in zip(parts, checkpoint.expert(spec, layer, expert), strict=True):
                    assert torch.equal(part, wanted)


def test_loads_keep_what_is_there(path: Path) -> None:
    slots, spec = make_slots(path)
    for experts in ([0, 1, 2, 3, -1], [3, 5, -1, 1, 7], [-1] * 5, [7, 6, 5, 4, 3]):
        slots.load(dict.fromkeys(spec.moe_layers, experts))
        assert slots.slots(spec.moe_layers[0]) == tuple(experts)
        check(slots, spec, path)


def test_commits_change_the_table_and_copy_nothing(path: Path) -> None:
    slots, spec = make_slots(path)
    layer, other = spec.moe_layers
    slots.load({layer: [0, 1, 2, 3, -1], other: [0, 1, 2, 3, 4]})
    for round_ in range(4):
        staged = slots.reserve(2)
        for into, expert in zip(staged, (6 + round_ % 2, 4), strict=True):
            slots.fetch(layer, expert, into)
        changes = [SlotChange(0, 6 + round_ % 2, staged[0]), SlotChange(4, 4, staged[1]), SlotChange(2, -1, None)]
        slots.commit(layer, changes)
        assert slots.read(layer, 0)[0].data_ptr() == staged[0][0].data_ptr()
        slots.release(staged)
        check(slots, spec, path)
        assert slots.slots(layer) == (6 + round_ % 2, 1, -1, 3, 4)
        slots.load({layer: [0, 1, 2, 3, -1], other: [0, 1, 2, 3, 4]})
        check(slots, spec, path)


def test_staging_is_bounded_and_given_back(path: Path) -> None:
    slots, _ = make_slots(path, spare=2)
    staged = slots.reserve(2)
    with pytest.raises(StagingFullError):
        slots.reserve(1)
    slots.release(staged)
    assert len(slots.reserve(2)) == 2


def test_random_weights_are_an_expert_s_own_whatever_the_order(path: Path) -> None:
    spec = load_spec(ModelConfig(path=path))
    first, second = (DummyCheckpoint(torch.device("cpu")) for _ in range(2))
    wanted = {expert: first.expert(spec, 1, expert) for expert in range(3)}
    for expert in (2, 0, 1):
        for part, other in zip(second.expert(spec, 1, expert), wanted[expert], strict=True):
            assert torch.equal(part, other)
    assert not torch.equal(wanted[0][0], wanted[1][0])
    assert torch.equal(first.layer_tensors(spec, 1)["q_proj"], second.layer_tensors(spec, 1)["q_proj"])
