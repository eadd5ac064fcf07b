"""A placement file from a recorded trace of the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expertmesh.balancer.placement_file import read_placement_file
from expertmesh.cli.place import place
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.spec import load_spec
from expertmesh.v1 import mesh_pb2

TRACE = Path(__file__).parents[1] / "data" / "demo_routing.npz"


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(place)
    return CliRunner().invoke(app, [str(TRACE), "--slots", "36", *arguments])


def test_the_file_places_the_model_that_it_is_for(tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    done = run("--ranks", "3", "--out", str(out))
    assert done.exit_code == 0, done.output
    file, spec = read_placement_file(out), load_spec(ModelConfig())
    shape = mesh_pb2.ModelShape(name=spec.name, num_experts=spec.num_experts, moe_layers=spec.moe_layers)
    assert file.mismatch(shape, spec.fingerprint) is None
    assert [layer.layer for layer in file.layers] == list(spec.moe_layers)
    assert file.slot_servers == ("expert-0",) * 12 + ("expert-1",) * 12 + ("expert-2",) * 12
    for layer in file.layers:
        assert set(layer.slots) == set(range(spec.num_experts))
        assert len(layer.slots) == 36


def test_json_tells_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    told = json.loads(run("--ranks", "2", "--servers", "a,b", "--out", str(out), "--json").stdout)
    assert told == {"file": str(out), "layers": list(range(8)), "slots": 36, "servers": ["a", "b"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", "3", "--servers", "a,b"), "--servers: 'a,b' does not name 3 servers"),
        (("--ranks", "2", "--servers", "a,a"), "--servers: 'a,a' does not name 2 servers"),
        (("--ranks", "3", "--dtype", "int8"), "--dtype: is 'int8'"),
        (
            (
                "--ranks",
                "40",
            ),
            "ranks",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments, "--out", str(tmp_path / "out.json"))
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
    assert not (tmp_path / "out.json").exists()
