from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertmesh.cli.addresses import RUN_FILE, balancer_address, router_address
from expertmesh.mesh.errors import UserError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPERTMESH_ROUTER", raising=False)
    monkeypatch.delenv("EXPERTMESH_BALANCER", raising=False)


def _write_run_file(text: str) -> None:
    RUN_FILE.parent.mkdir()
    RUN_FILE.write_text(text)


def test_option_wins_over_environment_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    _write_run_file(json.dumps({"router": "c:3", "balancer": "c:4"}))
    monkeypatch.setenv("EXPERTMESH_ROUTER", "b:2")
    assert router_address("a:1") == "a:1"
    assert router_address() == "b:2"
    assert balancer_address() == "c:4"


def test_without_any_source_the_remedy_is_named() -> None:
    with pytest.raises(UserError, match="start a mesh here with `expertmesh up`"):
        router_address()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"balancer": "a:1"}'])
def test_broken_run_file_is_named(text: str) -> None:
    _write_run_file(text)
    with pytest.raises(UserError, match="cannot be used"):
        router_address()


@pytest.mark.parametrize("address", ["", "localhost", ":80", "host:", "host:0", "host:65536", "host:http", "host:²"])
def test_bad_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        router_address(address)
