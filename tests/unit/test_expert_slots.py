from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.expert_server.server import ExpertServer
from expertmesh.expert_server.slots import Slots
from expertmesh.expert_server.staging import Staging
from expertmesh.mesh.config import MeshConfig, ModelConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import StagingFullError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.telemetry import disabled_telemetry
from support.checkpoints import write_checkpoint

NUM_SLOTS = 4
LAYERS = (1, 2)


class CountingCheckpoint(Checkpoint):
    """Remembers which experts were read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []

    def copy_expert(self, spec: ModelSpec, layer: int, expert: int, *parts: torch.Tensor) -> None:
        self.reads.append((layer, expert))
        super().copy_expert(spec, layer, expert, *parts)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", shards=3, mlp_only_layers=[0])


def make_slots(path: Path) -> tuple[Slots, ModelSpec, CountingCheckpoint]:
    spec, checkpoint = load_spec(ModelConfig(path=path)), CountingCheckpoint(path)
    config = parse_config({"expert": {"servers": 2, "slots_per_server": NUM_SLOTS}})
    server = ExpertServer(config, spec, checkpoint, disabled_telemetry())
    assert server.half is server.slots
    assert isinstance(server.slots, Slots)
    return server.slots, spec, checkpoint


def holds_what_it_says(slots: Slots, spec: ModelSpec, path: Path) -> None:
    """Every slot computes with its expert's weights; an empty one computes NaN."""
    checkpoint = Checkpoint(path)
    generator = torch.Generator().manual_seed(1)
    rows_NH = torch.randn(slots.num_slots, spec.hidden_size, generator=generator)
    counts_S = torch.ones(slots.num_slots, dtype=torch.int64)
    for layer in spec.moe_layers:
        y_NH = slots.compute(layer, rows_NH, counts_S)
        for row_H, y_H, expert in zip(rows_NH, y_NH, slots.slots(layer), strict=True):
            if expert == -1:
                assert y_H.isnan().all()
                continue
            gate_up, down = checkpoint.expert(spec, layer, expert)
            gate, up = (gate_up @ row_H).chunk(2)
            torch.testing.assert_close(y_H, down @ (torch.nn.functional.silu(gate) * up), rtol=1e-4, atol=1e-3)


def test_slots_start_empty_and_hold_what_is_placed(path: Path) -> None:
    slots, spec, checkpoint = make_slots(path)
    assert (slots.num_slots, spec.moe_layers) == (NUM_SLOTS, LAYERS)
    assert slots.slots(1) == (-1, -1, -1, -1)
    slots.load({1: [3, 0, 7, -1], 2: [4, 5, 6, 7]})
    assert (slots.slots(1), slots.slots(2)) == ((3, 0, 7, -1), (4, 5, 6, 7))
    assert sorted(checkpoint.reads) == [(1, 0), (1, 3), (1, 7), (2, 4), (2, 5), (2, 6), (2, 7)]
    holds_what_it_says(slots, spec, path)


def test_only_what_is_missing_is_read(path: Path) -> None:
    slots, spec, checkpoint = make_slots(path)
    slots.load({1: [0, 1, 2, -1], 2: [0, 1, 2, 3]})
    checkpoint.reads.clear()
    # Layer 1: a swap, a replica in the empty slot, one emptied; layer 2: a rotation with one newcomer.
    slots.load({1: [1, 0, -1, 1], 2: [7, 0, 1, 2]})
    assert checkpoint.reads == [(2, 7)]
    holds_what_it_says(slots, spec, path)


PLACEMENT = st.fixed_dictionaries(
    {layer: st.lists(st.integers(-1, 7), min_size=NUM_SLOTS, max_size=NUM_SLOTS) for layer in LAYERS}
)


@pytest.mark.slow
@settings(max_examples=40)
@given(placements=st.lists(PLACEMENT, min_size=1, max_size=4))
def test_any_sequence_of_placements(path: Path, placements: list[dict[int, list[int]]]) -> None:
    slots, spec, checkpoint = make_slots(path)
    for placement in placements:
        before = {layer: set(slots.slots(layer)) for layer in LAYERS}
        checkpoint.reads.clear()
        slots.load(placement)
        assert {layer: list(slots.slots(layer)) for layer in LAYERS} == placement
        assert all(expert not in before[layer] for layer, expert in checkpoint.reads)
        holds_what_it_says(slots, spec, path)


@pytest.mark.parametrize(
    ("placement", "problem"),
    [
        ({1: [0, 1, 2, 3]}, r"for layers \[1\], the model has \[1, 2\]"),
        ({0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}, r"for layers \[0, 1, 2\]"),
        ({1: [0, 1, 2], 2: [0, 1, 2, 3]}, "layer 1 fills 3 slots, there are 4"),
        ({1: [0, 1, 2, 8], 2: [0, 1, 2, 3]}, r"layer 1 names an expert outside 0\.\.7"),
        ({1: [0, 1, 2, 3], 2: [-2, 1, 2, 3]}, r"layer 2 names an expert outside 0\.\.7"),
    ],
)
def test_a_placement_for_something_else_changes_nothing(
    path: Path, placement: dict[int, list[int]], problem: str
) -> None:
    slots, spec, _ = make_slots(path)
    slots.load({1: [0, 1, 2, 3], 2: [4, 5, 6, 7]})
    with pytest.raises(ValueError, match=problem):
        slots.load(placement)
    assert (slots.slots(1), slots.slots(2)) == ((0, 1, 2, 3), (4, 5, 6, 7))
    holds_what_it_says(slots, spec, path)


def test_a_checkpoint_that_vanished_leaves_slots_that_say_so(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", mlp_only_layers=[0])
    slots, _, _ = make_slots(path)
    (path / "model.safetensors").rename(path / "gone")
    with pytest.raises(UserError, match="cannot be read"):
        slots.load({1: [0, 1, 2, 3], 2: [4, 5, 6, 7]})
    assert slots.slots(1) == (-1, -1, -1, -1)
    (path / "gone").rename(path / "model.safetensors")
    slots.load({1: [0, 1, 2, 3], 2: [4, 5, 6, 7]})
    assert slots.slots(2) == (4, 5, 6, 7)


def test_no_rows(path: Path) -> None:
    slots, spec, _ = make_slots(path)
    out_NH = slots.compute(1, torch.empty(0, spec.hidden_size), torch.zeros(NUM_SLOTS, dtype=torch.int64))
    assert out_NH.shape == (0, spec.hidden_size)


def test_fewer_slots_than_experts(path: Path) -> None:
    spec = load_spec(ModelConfig(path=path))
    with pytest.raises(UserError, match=r"expert\.num_slots: 7 slots cannot hold the model's 8 experts"):
        ExpertServer(parse_config({"expert": {"num_slots": 7}}), spec, Checkpoint(path), disabled_telemetry())
    assert ExpertServer(MeshConfig(), spec, Checkpoint(path), disabled_telemetry()).half.num_slots == 4


def test_staging_memory_that_has_its_place(path: Path) -> None:
    """What was handed out before it got one comes back all the same."""
    staging = Staging(load_spec(ModelConfig(path=path)), capacity=4)
    before = staging.reserve(2)
    ends = [(part.data_ptr(), part.data_ptr() + part.nbytes) for part in staging.memory()]
    staged = staging.reserve(2)
    with pytest.raises(StagingFullError, match="4 of the 4 places are taken"):
        staging.reserve(1)
    staging.release(before)
    staging.release(staged[:1])
    staged = [staged[1], *staging.reserve(3)]
    for places, (start, end) in zip(zip(*staged, strict=True), ends, strict=True):
        assert sorted(part.data_ptr() for part in places) == [*range(start, end, (end - start) // 4)]
    staging.release(staged)
    assert staging.used == 0
