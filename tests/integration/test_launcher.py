"""The launcher's supervision, with small stand-in services in place of the mesh's own."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertmesh.cli.process import FAILED_STARTS, ProcessEvent, ServiceProcess
from expertmesh.cli.state_dir import RunFile, StateDir, is_held
from expertmesh.mesh.errors import UserError

pytestmark = pytest.mark.slow

READY = 'import json, sys; print(json.dumps({"ready": True, "address": "127.0.0.1:7"}), flush=True); '
WAIT = "sys.stdin.read()"

StartService = Callable[..., ServiceProcess]


class Events:
    """Collects what the keeper's thread tells and waits for one kind."""

    def __init__(self) -> None:
        self._queue: queue.Queue[ProcessEvent] = queue.Queue()
        self.seen: list[ProcessEvent] = []

    def put(self, event: ProcessEvent) -> None:
        self._queue.put(event)

    def wait_for(self, kind: str, timeout_s: float = 20.0) -> ProcessEvent:
        while True:
            event = self._queue.get(timeout=timeout_s)
            self.seen.append(event)
            if event.kind == kind:
                return event


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def start(tmp_path: Path, events: Events) -> Iterator[StartService]:
    started: list[ServiceProcess] = []

    def start_service(program: str, restart: bool = True) -> ServiceProcess:
        service = ServiceProcess(
            role="expert",
            server_id="expert-0",
            command=lambda: [sys.executable, "-c", program],
            environment=os.environ,
            log_file=tmp_path / "expert-0.log",
            on_event=events.put,
            restart=restart,
        )
        service.start()
        started.append(service)
        return service

    yield start_service
    for service in started:
        service.begin_stop()
        service.finish_stop(5.0)


def test_ready_line_gives_the_address(start: StartService, events: Events) -> None:
    service = start(READY + WAIT)
    assert events.wait_for("ready").text == "ready on 127.0.0.1:7"
    assert service.address == "127.0.0.1:7"


def test_killed_service_starts_again(start: StartService, events: Events) -> None:
    service = start(READY + WAIT)
    events.wait_for("ready")
    first_pid = service.pid
    service.kill(signal.SIGKILL)
    assert "killed by SIGKILL" in events.wait_for("restarting").text
    events.wait_for("ready")
    assert service.pid not in (None, first_pid)
    assert service.starts == 2


def test_killed_service_starts_again_when_it_may(start: StartService, events: Events) -> None:
    service = start(READY + WAIT)
    events.wait_for("ready")
    service.hold_restarts()
    service.kill(signal.SIGKILL)
    events.wait_for("restarting")
    with pytest.raises(queue.Empty):  # longer than the first back-off
        events.wait_for("starting", timeout_s=1.0)
    service.allow_restarts()
    events.wait_for("ready")
    assert service.starts == 2


def test_held_service_can_be_stopped(start: StartService, events: Events) -> None:
    service = start(READY + WAIT)
    events.wait_for("ready")
    service.hold_restarts()
    service.kill(signal.SIGKILL)
    events.wait_for("restarting")
    service.begin_stop()
    assert service.finish_stop(5.0)
    assert service.starts == 1


def test_service_that_leaves_is_not_started_again(start: StartService, events: Events) -> None:
    service = start(READY)
    events.wait_for("left")
    assert service.finish_stop(5.0)
    assert service.starts == 1


def test_without_restart_a_killed_service_stays_dead(start: StartService, events: Events) -> None:
    service = start(READY + WAIT, restart=False)
    events.wait_for("ready")
    service.kill(signal.SIGKILL)
    assert "killed by SIGKILL" in events.wait_for("left").text
    assert service.finish_stop(5.0)
    assert service.pid is None


def test_user_error_is_given_up_with_its_message(start: StartService, events: Events) -> None:
    service = start('import sys; print("error: model.path: no such folder; give one", file=sys.stderr); sys.exit(2)')
    failed = events.wait_for("failed")
    assert failed.text == "model.path: no such folder; give one"
    assert failed.exit_code == 2
    assert service.starts == 1


def test_service_that_cannot_start_is_given_up_with_the_end_of_its_log(start: StartService, events: Events) -> None:
    service = start('raise RuntimeError("broken build")')
    failed = events.wait_for("failed")
    assert "exited with 1" in failed.text
    assert "RuntimeError: broken build" in failed.text
    assert service.starts == FAILED_STARTS


def test_established_service_is_never_given_up(start: StartService, events: Events) -> None:
    service = start(READY + "sys.exit(1)")
    service.established = True
    for _ in range(FAILED_STARTS + 1):
        events.wait_for("restarting")


def test_service_that_is_not_ready_is_not_waited_for(start: StartService, tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    os.mkfifo(deaf)
    ignores = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    service = start(f"{ignores}open({str(deaf)!r}, 'w').close(); {WAIT}")
    assert deaf.read_text(encoding="utf-8") == ""  # which waits until it is open for writing, and so until it ignores
    service.begin_stop()
    assert service.finish_stop(5.0)


def test_file_in_the_way_of_the_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"mesh: cannot be written \(Not a directory\)"):
        StateDir.claim_free(tmp_path / "state", "mesh")


def test_service_that_ignores_sigterm_is_killed(start: StartService, events: Events) -> None:
    service = start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + WAIT)
    events.wait_for("ready")
    service.begin_stop()
    assert not service.finish_stop(0.2)
    assert service.pid is None


def test_state_dir_is_held_by_one_mesh(tmp_path: Path) -> None:
    first = StateDir.claim_free(tmp_path, "mesh")
    second = StateDir.claim_free(tmp_path, "mesh")
    assert first.path.name == "mesh"
    assert second.path.name == "mesh-2"
    with pytest.raises(UserError, match="another mesh runs in it"):
        StateDir.claim(first.path)
    first.release()
    assert not is_held(first.path)
    assert is_held(second.path)
    second.release()


def test_run_file_of_a_running_mesh_is_left_alone_and_of_a_dead_one_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    first, second = StateDir.claim(tmp_path / "a"), StateDir.claim(tmp_path / "b")
    first_file, second_file = RunFile(path, first.path), RunFile(path, second.path)
    first_file.write("127.0.0.1:1", "127.0.0.1:2")
    second_file.write("127.0.0.1:3", "127.0.0.1:4")
    second_file.remove()
    assert json.loads(path.read_text())["router"] == "127.0.0.1:1"
    first.release()
    second_file.write("127.0.0.1:3", "127.0.0.1:4")
    assert json.loads(path.read_text())["router"] == "127.0.0.1:3"
    second_file.remove()
    assert not path.exists()
    second.release()
