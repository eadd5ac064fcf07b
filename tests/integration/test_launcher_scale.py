"""How many servers the launcher starts, with small stand-in services and a balancer of a few lines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertmesh.cli.local_errors import MeshFailedError
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.process import ProcessEvent
from expertmesh.cli.state_dir import StateDir
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.mesh import mesh_config

pytestmark = pytest.mark.slow

READY = 'import json, sys; print(json.dumps({"ready": True, "address": "127.0.0.1:7"}), flush=True); '
WAIT = "sys.stdin.read()"
TIMEOUT_S = 20.0


def scale(attention: int, expert: int) -> admin_pb2.Scale:
    roles = ((mesh_pb2.ROLE_ATTENTION, attention), (mesh_pb2.ROLE_EXPERT, expert))
    return admin_pb2.Scale(roles=[admin_pb2.RoleScale(role=role, target=target) for role, target in roles])


class SaidBefore:
    """In place of ``ScaleWatch``: says what the balancer remembers when it is started, and then what a test says."""

    remembers = scale(1, 3)

    def __init__(
        self,
        addresses: object,
        tls: object,
        launcher: str,
        on_scale: Callable[[admin_pb2.Scale], None],
        api_key: object,
    ) -> None:
        self.say = on_scale

    def start(self) -> None:
        threading.Thread(target=self.say, args=(self.remembers,)).start()

    def stop(self) -> None:
        pass


class Seen:
    """What happened to the services, as a condition to wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[tuple[str, str]] = []

    def __call__(self, event: ProcessEvent) -> None:
        with self._changed:
            self._events.append((event.kind, event.server_id))
            self._changed.notify_all()

    def ids(self, kind: str) -> set[str]:
        return {server_id for seen, server_id in self._events if seen == kind}

    def wait_for(self, kind: str, *ids: str) -> None:
        with self._changed:
            found = self._changed.wait_for(lambda: set(ids) <= self.ids(kind), TIMEOUT_S)
        assert found, f"{self._events}, not {kind} {ids}"


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def launch(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalMesh]]:
    started: list[LocalMesh] = []
    monkeypatch.setattr("expertmesh.cli.local_mesh.ScaleWatch", SaidBefore)
    programs: dict[str, str] = {"attention-1": "import sys; sys.exit(2)"}

    def command(role: str, server_id: str) -> list[str]:
        return [sys.executable, "-c", programs.get(server_id, READY + WAIT)]

    def launched(**overrides: object) -> LocalMesh:
        config = mesh_config(attention__servers=1, expert__servers=3, **overrides)
        mesh = LocalMesh(config, StateDir.claim(tmp_path / "mesh"), on_event=seen)
        monkeypatch.setattr(mesh, "_command", command)
        started.append(mesh)
        mesh.start()
        return mesh

    yield launched
    for mesh in started:
        mesh.stop()


def say(mesh: LocalMesh, said: admin_pb2.Scale) -> None:
    watch = mesh._watch
    assert isinstance(watch, SaidBefore)
    watch.say(said)


def test_a_balancer_with_a_past_decides_how_many_start(
    launch: Callable[..., LocalMesh], seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaidBefore, "remembers", scale(1, 2))
    mesh = launch(balancer__state_dir=tmp_path / "state")
    seen.wait_for("ready", "balancer", "router-0", "attention-0", "expert-0", "expert-1")
    assert [name for name in mesh.servers if name.startswith("expert")] == ["expert-0", "expert-1"]
    say(mesh, scale(1, 4))
    seen.wait_for("ready", "expert-3", "expert-4")
    assert "expert-2" not in seen.ids("starting")


def test_only_what_was_not_asked_for_before_is_started(launch: Callable[..., LocalMesh], seen: Seen) -> None:
    mesh = launch()
    seen.wait_for("ready", "expert-0", "expert-1", "expert-2")
    for target in (4, 3, 3, 4):  # expert-3, then a drain that goes on, then another one
        say(mesh, scale(1, target))
    seen.wait_for("ready", "expert-3", "expert-4")
    say(mesh, scale(0, 0))
    assert sum(name.startswith("expert") for name in mesh.servers) == 5, "what is there too much of leaves by itself"


def test_an_extra_server_that_gives_up_leaves_the_mesh_running(launch: Callable[..., LocalMesh], seen: Seen) -> None:
    mesh = launch()
    seen.wait_for("ready", "attention-0")
    say(mesh, scale(2, 2))
    seen.wait_for("failed", "attention-1")
    mesh.raise_failure()
    say(mesh, scale(3, 2))
    seen.wait_for("ready", "attention-2")
    assert mesh.servers["attention-2"].established, "from now on it is started again whenever it dies"


def test_a_server_that_is_added_by_hand_and_gives_up_is_an_error(launch: Callable[..., LocalMesh], seen: Seen) -> None:
    mesh = launch()
    with pytest.raises(MeshFailedError, match="attention-1 cannot start"):
        mesh.add("attention", timeout_s=TIMEOUT_S)
    mesh.raise_failure()
    assert mesh.add("attention", timeout_s=TIMEOUT_S) == "attention-2"
