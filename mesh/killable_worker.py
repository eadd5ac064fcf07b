"""Work that a hostile input may blow up, in a process of its own that may die of it: both of its ends.

The process reads JSON objects, one a line, and answers each with one: first what it is to work with, then questions. It
ends with its standard input. A question that is too much for it kills it: its limits are the kernel's, no code has to
notice them. The next question starts another process; without questions there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
"""Of one question: the process ends itself long before, unless it gets no CPU time at all."""

_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLimits:
    """Of one process.

    ``cpu_s``: of one question. ``memory_bytes``: of address space, beside what there is once it can be asked.
    ``nice``: how far it steps back behind others.
    """

    cpu_s: float
    memory_bytes: int
    nice: int = 0


_INHERITED = (
    "HOME",
    "LANG",
    "LC_",
    "LD_LIBRARY_PATH",
    "OMP_",
    "PATH",
    "PYTHON",
    "RAYON_",
    "TMPDIR",
    "TZ",
    "VIRTUAL_ENV",
)
"""Beginnings of the variables that the process gets: what a hostile input gets hold of holds no password."""


class UnusableError(Exception):
    """What the process is to work with is of no use; the message says why."""


class BusyError(Exception):
    """Too many others wait; the message says how many."""


class TooMuchError(Exception):
    """The process ended because of the question; the message says how."""


class LostError(Exception):
    """The process ended or did not answer, twice, which says nothing of the question."""


class KillableWorker:
    """The asker's end: one process, one question after the other. Runs on the event loop; ``close`` it.

    Args:
        module: whose ``main`` is a ``serve``.
        setup: what it is to work with.
        verb: what it does with a question, for messages.
        max_pending: questions without an answer.
        command: to start instead of the module, for tests.
    """

    def __init__(
        self,
        module: str,
        setup: Mapping[str, Any],
        limits: WorkerLimits,
        *,
        verb: str,
        max_pending: int,
        command: Sequence[str] = (),
    ) -> None:
        self._name = module.rpartition(".")[2]
        self._command = command or (sys.executable, "-P", "-m", module)
        self._setup = setup
        self._limits = limits
        self._max_pending = max_pending
        self._too_much = {
            -signal.SIGPROF: f"takes more than {limits.cpu_s:g} s of CPU time to {verb}",
            -signal.SIGABRT: f"takes more than {limits.memory_bytes >> 20} MiB of memory to {verb}",
            -signal.SIGSEGV: "is nested too deeply",
            1: f"fails to {verb}",
        }
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that was started last; None = none, or it was too much for it."""
        return None if self._process is None else self._process.pid

    def start(self, question: Mapping[str, Any]) -> asyncio.Task[dict[str, Any]]:
        """The answer to come; raises UnusableError, TooMuchError, LostError. Wait for it behind ``asyncio.shield``.

        So that who goes away does not leave half an answer in the pipe.

        Raises:
            BusyError: too many others wait.
        """
        if len(self._tasks) >= self._max_pending:
            raise BusyError(f"{self._max_pending} others wait")
        task = asyncio.create_task(self._answer(question), name=self._name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises what ``start`` and its task do."""
        return await asyncio.shield(self.start(question))

    async def close(self) -> None:
        """Give up all questions and end the process."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._kill()

    async def _answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        async with self._turn:
            try:
                return await self._try(question)
            except LostError as error:
                log.warning("%s: the process is lost, another one is started: %s", self._name, error)
                return await self._try(question)

    async def _try(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await self._exchange(await self._open(), question, _TIMEOUT_S)
        except BaseException as error:
            if isinstance(error, TooMuchError):
                log.warning("%s: what was asked %s", self._name, error)
            await self._kill()
            raise

    async def _open(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is not None and process.returncode is None:
            return process
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                limit=self._limits.memory_bytes,  # no line of it is longer
            )
            unusable = (await self._exchange(process, self._setup, _START_TIMEOUT_S))["unusable"]
        except (OSError, TooMuchError) as error:
            raise LostError(f"it does not start: {error}") from None
        if unusable is not None:
            raise UnusableError(unusable)
        return process

    async def _exchange(
        self, process: asyncio.subprocess.Process, message: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        assert process.stdin is not None, "it was opened with pipes"
        assert process.stdout is not None, "it was opened with pipes"
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    process.stdin.write(_line(message))
                    await process.stdin.drain()
                except (ConnectionError, RuntimeError):  # the latter is what uvloop says of a pipe that closed
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()  # nothing reaches it any more; if it ended before, reading says how
                line = await process.stdout.readline()
                status = 0 if line.endswith(b"\n") else await process.wait()
        except TimeoutError:
            raise LostError(f"no answer within {timeout_s:g} s") from None
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        if status in self._too_much:
            raise TooMuchError(self._too_much[status])
        raise LostError(f"it ended with status {status}")

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()  # it was killed: this ends


def serve(
    open_setup: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]], limits: WorkerLimits
) -> None:
    """The process's end, all of its life.

    Args:
        open_setup: from what it is to work with to what answers questions; UnusableError says why it cannot.
    """
    os.nice(limits.nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who asks gets it too, and closes the pipe
    lines, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = lines.readline()
    if not setup:
        return
    try:
        answer = open_setup(json.loads(setup))
    except UnusableError as error:
        _write(answers, _line({"unusable": str(error)}))
        return
    limit = _address_space_bytes() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _write(answers, _line({"unusable": None}))
    for line in lines:
        # Nothing handles this signal: it ends the process, whatever that is in.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        try:
            said = _line(answer(json.loads(line)))
        except MemoryError:
            os.abort()  # as memory that is not Python's does where there is no more
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _write(answers, said)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _write(stream: Any, line: bytes) -> None:
    stream.write(line)
    stream.flush()


def _address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()
