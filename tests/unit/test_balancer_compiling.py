"""The solver is compiled in a child process, whose failure, delay or end with the balancer costs nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.balancer.compiling import WARM_UP, KernelCompiler
from expertmesh.balancer.evaluation import EvaluationWorker, Job
from expertmesh.balancer.policy import Layout, PlacementPolicy
from support.placement_policy import SwapPolicy

NO_LAYERS = Job(
    number=1,
    view_number=1,
    layout=Layout(width=1, room_R=(1,), node_R=("n",), server_R=("e",)),
    max_loads=None,
    layers=(),
)
HANGS = (sys.executable, "-c", "import sys, signal; print('at it', file=sys.stderr, flush=True); signal.pause()")
BALANCER = """
import asyncio, logging
from expertmesh.balancer.compiling import KernelCompiler
logging.basicConfig(level=logging.INFO)
asyncio.run(KernelCompiler().finished())
"""
MISSES = """
from expertmesh.balancer.policy_solver import SolverPolicy
from expertmesh.balancer.solver import anneal, balance, expected, problem, relabel, relieve, search_state
SolverPolicy().compile()
modules = anneal, balance, expected, problem, relabel, relieve, search_state
kernels = {kernel for module in modules for kernel in vars(module).values() if hasattr(kernel, "stats")}
assert len(kernels) > 20
print(sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels))
"""


def pid_of(caplog: pytest.LogCaptureFixture) -> int:
    message = next(r.getMessage() for r in caplog.records if "in process" in r.getMessage())
    return int(message.rsplit(" ", 1)[1])


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


class Started(logging.Handler):
    """Hears when the child has been started."""

    def __init__(self) -> None:
        super().__init__()
        self.pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        logging.getLogger("expertmesh.balancer.compiling").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "in process" in record.getMessage():
            self.pid.set_result(int(record.getMessage().rsplit(" ", 1)[1]))
            logging.getLogger("expertmesh.balancer.compiling").removeHandler(self)


@pytest.mark.slow
async def test_the_child_leaves_nothing_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    compiler = KernelCompiler()
    await compiler.finished()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert is_gone(pid_of(caplog))
    found = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", MISSES], capture_output=True, check=True)
    assert int(found.stdout) == 0
    await compiler.close()


async def test_the_first_job_waits_for_the_child_and_later_ones_do_not(tmp_path: Path) -> None:
    pipe = tmp_path / "go"
    os.mkfifo(pipe)
    compiler = KernelCompiler((sys.executable, "-c", f"open({str(pipe)!r}).read()"))
    made = []

    def make() -> PlacementPolicy:
        made.append(True)
        return SwapPolicy()

    worker = EvaluationWorker(make, compiler.finished)
    worker.warm_up()
    asked = asyncio.create_task(worker.ask(NO_LAYERS))
    writer = await asyncio.to_thread(open, pipe, "w")  # opens when the child reads
    assert (made, asked.done()) == ([], False)
    writer.close()
    assert (await asyncio.wait_for(asked, 20)).job is NO_LAYERS
    assert (await asyncio.wait_for(worker.ask(NO_LAYERS), 20)).job is NO_LAYERS
    assert made == [True]
    await worker.close()
    await compiler.close()


@pytest.mark.parametrize("command", [HANGS, WARM_UP], ids=["hangs", "compiles"])
async def test_the_child_ends_with_the_balancer(
    command: tuple[str, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # an installation that has compiled nothing yet
    compiler = KernelCompiler(command)
    worker = EvaluationWorker(SwapPolicy, compiler.finished)
    heard = Started()
    worker.warm_up()
    pid = await asyncio.wait_for(heard.pid, 20)
    assert not is_gone(pid)
    async with asyncio.timeout(10):  # compiling takes longer
        await worker.close()
        await compiler.close()
    assert is_gone(pid)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.slow
def test_the_child_does_not_outlive_a_killed_balancer(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", BALANCER], stderr=subprocess.PIPE, text=True, env=environment
    ) as balancer:
        assert balancer.stderr is not None
        pid = int(next(line for line in balancer.stderr if "in process" in line).rsplit(" ", 1)[1])
        assert not is_gone(pid)
        balancer.kill()
        assert balancer.stderr.read() == ""
    try:
        child = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([child], [], [], 20)
    os.close(child)
    assert ended, "the child compiles on for nobody"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ((sys.executable, "-c", "raise SystemExit('no room for kernels')"), "status 1: no room for kernels"),
        ((sys.executable, "-c", f"import os; os.kill(os.getpid(), {signal.SIGSEGV:d})"), "status -11"),
        (("/nowhere/python",), "/nowhere/python"),
        (HANGS, "had not ended after 0.1 s"),
    ],
    ids=["fails", "crashes", "is not there", "takes too long"],
)
async def test_a_child_that_fails_is_logged_and_the_solve_goes_on_without(
    command: tuple[str, ...], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    compiler = KernelCompiler(command, timeout_s=0.1 if command is HANGS else 20)
    worker = EvaluationWorker(SwapPolicy, compiler.finished)
    assert (await asyncio.wait_for(worker.ask(NO_LAYERS), 20)).job is NO_LAYERS
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert why in errors[0]
    if command is HANGS:
        assert is_gone(pid_of(caplog))
    await worker.close()
    await compiler.close()


@pytest.mark.slow
def test_without_a_folder_for_the_kernels_the_child_says_so() -> None:
    script = "import expertmesh.balancer.solver.warm_up as w; w.caches = lambda: False; w.main()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, "NUMBA_CACHE_DIR" in found.stderr) == (1, True)
