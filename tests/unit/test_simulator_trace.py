"""Traces: what is read, and what is refused with the key and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from expertmesh.balancer.simulator.simulate import make_topology, simulate
from expertmesh.balancer.simulator.trace import read_trace
from expertmesh.cli.simulate import simulate as command
from expertmesh.mesh.errors import UserError
from support.routing import topic_tokens

TOPK = np.stack([topic_tokens(16, 3, 400, seed=layer) for layer in range(2)])
KEYS = {
    "policy", "balancedness_mean", "balancedness_min", "fanout_ranks", "fanout_nodes", "solve_ms",
    "slots_loaded_per_layer", "balancedness_gap", "fanout_optimum", "fanout_gap", "optimum_layers",
}  # fmt: skip


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def with_id(value: int) -> np.ndarray[Any, Any]:
    topk = TOPK.copy()
    topk[1, 7, 2] = value
    return topk


@pytest.mark.parametrize(
    ("arrays", "key", "problem"),
    [
        ({"topk": TOPK}, "num_experts", "is missing"),
        ({"num_experts": 0, "topk": TOPK}, "num_experts", "not one integer"),
        ({"num_experts": 2.5, "topk": TOPK}, "num_experts", "not one integer"),
        ({"num_experts": [16, 16], "topk": TOPK}, "num_experts", "not one integer"),
        ({"num_experts": 16}, "topk, load", "has neither"),
        ({"num_experts": 16, "topk": with_id(16)}, "topk", "ids from 0 to 16, first in layer 1, token 7"),
        ({"num_experts": 16, "topk": with_id(-2)}, "topk", "ids from -2"),
        ({"num_experts": 16, "topk": TOPK.astype(np.float32)}, "topk", "is not int16"),
        ({"num_experts": 16, "topk": TOPK[0]}, "topk", "is not int16"),
        ({"num_experts": 16, "topk": TOPK[:, :0]}, "topk", "none of them 0"),
        ({"num_experts": 16, "topk": np.zeros((1, 4, 2), np.int16)}, "topk", "same expert twice"),
        ({"num_experts": 16, "topk": np.full((1, 4, 2), -1, np.int16)}, "topk", "no chosen expert"),
        ({"num_experts": 16, "topk": TOPK, "domain": np.zeros(3, np.int16)}, "domain", "is not int16"),
        ({"num_experts": 16, "topk": TOPK, "domain": np.full(400, 2), "domain_names": ["a"]}, "domain", "beyond"),
        ({"num_experts": 3, "load": np.ones((2, 4), np.float32)}, "load", "is not float32"),
        ({"num_experts": 2, "load": np.array([[1.0, np.nan]], np.float32)}, "load", "nan at layer 0, expert 1"),
        ({"num_experts": 2, "load": np.array([[1.0, -3.0]], np.float32)}, "load", "-3.0 at layer 0"),
        ({"num_experts": 2, "load": np.array([[0.0, 0.0]], np.float32)}, "load", "no load at all"),
    ],
)
def test_refused(tmp_path: Path, arrays: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_trace(write(tmp_path / "t.npz", **arrays))
    assert caught.value.key.endswith(f": {key}")
    assert problem in caught.value.problem
    assert "record it again" in caught.value.remedy


def test_pickles_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without pickles"):
        read_trace(write(tmp_path / "t.npz", num_experts=2, load=np.array([{"a": 1}], dtype=object)))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="record it again"):
        read_trace(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_trace(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("mesh", "key"),
    [
        ((15, 5, 1), "--slots"),
        ((-16, 4, 1), "--slots"),
        ((16, 0, 1), "--ranks"),
        ((16, 17, 1), "--ranks"),
        ((18, 4, 1), "--slots"),
        ((16, 4, 3), "--nodes"),
        ((16, 4, 0), "--nodes"),
        ((34, 2, 1), "--slots"),
    ],
)
def test_meshes_that_cannot_be_are_refused(mesh: tuple[int, int, int], key: str) -> None:
    slots, ranks, nodes = mesh
    with pytest.raises(UserError) as caught:
        make_topology(16, slots=slots, ranks=ranks, nodes=nodes)
    assert caught.value.key == key


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 1e-9, float("nan")])
def test_an_empty_part_is_refused(tmp_path: Path, fraction: float) -> None:
    trace = read_trace(write(tmp_path / "t.npz", num_experts=16, topk=TOPK))
    with pytest.raises(UserError, match="leaves a part empty"):
        simulate(trace, make_topology(16, slots=20, ranks=4, nodes=2), fraction)


def test_tokens_with_fewer_experts_count_less(tmp_path: Path) -> None:
    topk = TOPK.copy()
    topk[:, ::2, 1:] = -1
    trace = read_trace(write(tmp_path / "t.npz", num_experts=16, topk=topk))
    assert trace.load_LE.sum() == 2 * (200 * 3 + 200)
    for result in simulate(trace, make_topology(16, slots=20, ranks=4, nodes=2)):
        assert result.fanout_ranks is not None
        assert 1 <= result.fanout_ranks <= 2


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.slow
def test_command_prints_one_object_a_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", num_experts=16, topk=TOPK, domain=np.zeros(400, np.int16), domain_names=["x"])
    result = run(str(path), "--slots", "20", "--ranks", "4", "--nodes", "2", "--train-fraction", "0.4", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert all(set(row) == KEYS for row in rows)
    by_name = {row["policy"]: row for row in rows}
    assert {"linear", "eplb", "expertmesh"} <= set(by_name)
    assert by_name["linear"]["slots_loaded_per_layer"] == 0
    assert by_name["expertmesh"]["fanout_ranks"] < by_name["eplb"]["fanout_ranks"]
    assert run(str(path), "--slots", "20", "--ranks", "4").output.count("\neplb ") == 1


def test_command_on_loads_alone(tmp_path: Path) -> None:
    load = np.random.default_rng(0).lognormal(size=(3, 16)).astype(np.float32)
    result = run(str(write(tmp_path / "t.npz", num_experts=16, load=load)), "--slots", "20", "--ranks", "4", "--json")
    rows = {row["policy"]: row for row in json.loads(result.output)}
    assert rows["expertmesh"]["fanout_ranks"] is None
    assert rows["expertmesh"]["fanout_nodes"] is None
    assert rows["expertmesh"]["balancedness_mean"] >= rows["eplb"]["balancedness_mean"]


def test_command_raises_a_user_error(tmp_path: Path) -> None:
    assert isinstance(run(str(tmp_path / "none"), "--slots", "4", "--ranks", "2").exception, UserError)
