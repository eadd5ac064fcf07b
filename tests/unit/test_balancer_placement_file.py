"""Placement files: what is in them, what is refused, and the first view of mode offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.placement_file import read_placement_file, write_placement_file
from expertmesh.mesh.errors import UserError
from support.balancer_parts import config
from support.balancer_world import World

SLOTS = [7, 6, 5, 4, 0, 3, 2, 1, 0]
SERVERS = ["e2"] * 5 + ["e1"] * 4


def content(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "format": 1,
        "model": "m",
        "fingerprint": "f",
        "num_experts": 8,
        "view": 1,
        "servers": SERVERS,
        "layers": [{"layer": 0, "version": 1, "slots": SLOTS}, {"layer": 2, "version": 1, "slots": SLOTS}],
    }
    return made | changes


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(content(**changes)))
    return path


def offline(path: Path) -> World:
    return World(config(mode="offline", placement_file=str(path)), initial=read_placement_file(path))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = read_placement_file(write(tmp_path / "a.json"))
    assert [list(layer.slots) for layer in file.layers] == [SLOTS, SLOTS]
    assert (file.slot_servers, file.view_number) == (tuple(SERVERS), 1)
    write_placement_file(tmp_path / "b.json", file)
    again = read_placement_file(tmp_path / "b.json")
    assert again.layers == file.layers
    with pytest.raises(UserError, match="cannot be written"):
        write_placement_file(tmp_path, file)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"num_experts": 9}, "no slot holds expert 8"),
        ({"servers": ["e2"] * 9}, "e2 holds expert 0 2 times"),
        ({"servers": ["e2"] * 3}, "9 slots are given, there are 3"),
        ({"layers": []}, "layers: "),
        ({"layers": [{"layer": 0, "slots": [0.5]}]}, "layers.0.slots.0: "),
        ({"layers": [{"layer": 0, "slots": [*SLOTS[:8], 99]}]}, "expert 99 is out of range"),
        ({"layers": [{"layer": 0, "slots": [2**40, *SLOTS[1:]]}]}, "out of range"),
        ({"layers": [{"layer": 0, "slots": SLOTS}] * 2}, "places a layer twice"),
        ({"fingerprint": None}, "fingerprint: "),
        ({"surprise": 1}, "surprise: "),
    ],
)
def test_a_file_that_is_wrong_by_itself_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "a.json", **changes)
    with pytest.raises(UserError) as error:
        read_placement_file(path)
    assert problem in str(error.value)
    assert str(path) in str(error.value)


@given(data=st.binary(max_size=40))
def test_no_bytes_are_taken_for_a_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("files") / "a.json"
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_placement_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: cannot be read"):
        read_placement_file(tmp_path / "none.json")


def test_the_first_view_starts_from_the_file_and_later_ones_keep_it(tmp_path: Path) -> None:
    w = offline(write(tmp_path / "a.json"))
    w.form("a1", "e1", "e2")
    expected = [3, 2, 1, 0, -1, -1, -1, -1, 7, 6, 5, 4, 0, -1, -1, -1]
    assert (w.slots(0), w.slots(2)) == (expected, expected)
    assert w.versions() == {0: 1, 2: 1}
    w.join("a2")
    w.advance(1)
    assert w.slots(0) == expected, "the expert servers are the same"
    w.join("e3")
    w.advance(1)
    assert {expert for expert in w.slots(0) if expert >= 0} == set(range(8))
    w.restart_balancer()
    for server_id in ("a1", "a2", "e1", "e2", "e3"):
        w.rejoin(server_id)
    w.advance(1)
    assert (w.view.number, w.phase) == (3, Phase.SERVING), "a mesh that runs is adopted as it is"


def test_layers_that_the_file_leaves_out_are_placed_as_ever(tmp_path: Path) -> None:
    w = offline(write(tmp_path / "a.json", layers=[{"layer": 2, "slots": SLOTS}]))
    w.form("a1", "e1", "e2")
    assert w.slots(0)[:4] == [0, 1, 2, 3]
    assert w.slots(2)[:4] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other"}, "made for the model m with the fingerprint other, this mesh runs m with f"),
        ({"num_experts": 8, "layers": [{"layer": 1, "slots": SLOTS}]}, "layer 1, which is no MoE layer of m"),
        ({"servers": ["e9"] * 5 + ["e1"] * 4}, "e9 is no expert server of this mesh; it has e1, e2"),
        (
            {"num_experts": 9, "layers": [{"layer": 0, "slots": [7, 6, 5, 4, 8, 3, 2, 1, 0]}]},
            "made for 9 experts a layer, this model has 8",
        ),
    ],
)
def test_a_file_for_another_mesh_serves_nothing_and_says_why(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "a.json", **changes)
    w = offline(path)
    w.join("a1", "e1", "e2")
    w.advance(1)
    assert w.phase is Phase.NONE
    assert reason in w.actual.why_not_serving()
    assert "balancer.placement_file" in w.actual.why_not_serving()
    assert str(path) in w.actual.why_not_serving()
