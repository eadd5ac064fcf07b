"""``expertmesh up`` with the mesh's own services, as a person starts and stops it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from expertmesh.mesh.model.demo import demo_model_path
from support.hub import COMMIT, FakeHub, serve_hub

pytestmark = pytest.mark.slow

UP = [sys.executable, "-P", "-m", "expertmesh.cli.main", "up"]
SMALL = ["--attention", "1", "--experts", "1"]
TIMEOUT_S = 90
READY_BUDGET_S = 15.0
NUM_RANKS = 5

StartUp = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, folder: Path = tmp_path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*UP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, process_group=0
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def router_line(process: subprocess.Popen[str]) -> str:
    """The address that the mesh announces."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        pytest.fail(f"up ended with {process.returncode}:\n{stderr}")
    assert line.startswith("router listening on 127.0.0.1:")
    return line.split()[-1]


def services_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, stdout, stderr


def assert_all_end(services: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(services, timeout=15)
    assert not alive


def test_command_runs_beside_the_mesh_and_gives_the_status(start_up: StartUp, tmp_path: Path) -> None:
    program = "import os, sys; print(os.environ['EXPERTMESH_ROUTER'], os.environ['EXPERTMESH_BALANCER']); sys.exit(7)"
    process = start_up(*SMALL, "--", sys.executable, "-c", program)
    router = router_line(process)
    status, stdout, stderr = finish(process)
    assert status == 7, stderr
    assert stdout.split()[0] == router
    assert not (tmp_path / ".expertmesh/run.json").exists()
    assert (tmp_path / ".expertmesh/mesh/mesh.yaml").exists()


def test_sigterm_stops_every_process_and_exits_0(start_up: StartUp, tmp_path: Path) -> None:
    process = start_up(*SMALL)
    router = router_line(process)
    assert json.loads((tmp_path / ".expertmesh/run.json").read_text())["router"] == router
    services = services_of(process)
    assert len(services) == 4
    process.terminate()
    status, _, stderr = finish(process)
    assert status == 0, stderr
    assert "killed" not in stderr
    assert not any(service.is_running() for service in services)
    assert not (tmp_path / ".expertmesh/run.json").exists()


def test_ctrl_c_while_the_mesh_starts(start_up: StartUp) -> None:
    process = start_up(*SMALL)
    assert process.stderr is not None
    assert "starting" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    status, _, stderr = finish(process)
    assert status == 130, stderr


def test_services_do_not_outlive_a_killed_launcher(start_up: StartUp) -> None:
    process = start_up(*SMALL)
    router_line(process)
    services = services_of(process)
    process.kill()
    process.wait(timeout=TIMEOUT_S)
    assert_all_end(services)


def test_default_mesh_is_ready_in_time(start_up: StartUp) -> None:
    process = start_up("--", sys.executable, "-c", "")
    status, _, stderr = finish(process)
    assert status == 0, stderr
    served = next(line for line in stderr.splitlines() if "the mesh serves after" in line)
    seconds = float(served.split()[-2])
    # The budget is for two cores that do nothing else: they import torch for five ranks in a fourth of it.
    assert seconds <= READY_BUDGET_S or seconds <= 4 * import_seconds()


def import_seconds() -> float:
    """What the ranks pay before anything else, on this machine at this moment."""
    started_s = time.monotonic()
    importing = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(NUM_RANKS)]
    assert [process.wait(TIMEOUT_S) for process in importing] == [0] * NUM_RANKS
    return time.monotonic() - started_s


def test_two_meshes_in_one_folder(start_up: StartUp, tmp_path: Path) -> None:
    first = start_up(*SMALL)
    router = router_line(first)
    second = start_up(*SMALL, "--", sys.executable, "-c", "import os; print(os.environ['EXPERTMESH_ROUTER'])")
    second_router = router_line(second)
    status, _, stderr = finish(second)
    assert status == 0, stderr
    assert second_router != router
    assert json.loads((tmp_path / ".expertmesh/run.json").read_text())["router"] == router
    assert (tmp_path / ".expertmesh/mesh-2/mesh.yaml").exists()
    first.terminate()
    assert finish(first)[0] == 0


def test_error_of_a_service_stops_the_mesh_with_its_message(start_up: StartUp, tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(
        "dataplane: {interface_host: 203.0.113.7}\n", encoding="utf-8"
    )  # nobody's address
    status, _, stderr = finish(start_up(*SMALL, "--config", "mesh.yaml"))
    assert status == 2
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert errors[0].startswith("error: dataplane.interface_host"), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-slots", "31"], "expert.num_slots: 31 slots cannot hold the model's 32 experts a layer; set it to 32"),
        (["--model", "./nothing-here"], "model.path: "),
        (["--port", "{taken}"], "router.port: 127.0.0.1:{taken} cannot be bound"),
    ],
)
def test_what_can_be_told_at_once_is_told_before_anything_starts(
    start_up: StartUp, arguments: list[str], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, _, stderr = finish(start_up(*(argument.format(taken=port) for argument in arguments)))
    assert status == 2
    assert stderr.startswith(f"error: {message.format(taken=port)}"), stderr
    assert len(stderr.splitlines()) == 1


def test_command_that_does_not_exist(start_up: StartUp) -> None:
    status, _, stderr = finish(start_up(*SMALL, "--", "no-such-command"))
    assert status == 127
    assert "error: no-such-command: cannot be found or run" in stderr
    assert "starting" not in stderr, "nothing has to start to tell that"


def test_model_of_the_hub(start_up: StartUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mesh.yaml").write_text("model: {path: /somewhere/else}")
    status = [sys.executable, "-P", "-m", "expertmesh.cli.main", "balancer", "status", "--json"]
    with serve_hub(FakeHub("org/demo", demo_model_path())) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        code, stdout, stderr = finish(start_up("--config", "mesh.yaml", "--model", "org/demo", *SMALL, "--", *status))
    assert code == 0, stderr
    assert f"snapshots/{COMMIT}" in stderr
    assert json.loads(stdout.partition("\n")[2])["model"] == "org/demo"
    assert sorted(hub.asked) == sorted(set(hub.asked)), "services read what `up` has fetched"
