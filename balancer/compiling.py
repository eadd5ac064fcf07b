"""The solver's kernels are compiled in a process of their own, which can be killed and holds no lock of the balancer.

Compiling takes tens of seconds of CPU time, once an installation, and much of it under Python's lock. On a thread it
would hold up the event loop, and the process could not end before it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

WARM_UP = (sys.executable, "-P", "-m", "expertmesh.balancer.solver.warm_up", "--stop-with-stdin")
COMPILE_TIMEOUT_S = 240.0
"""Less than an evaluation may take, with a busy machine in mind."""
_STDERR_KEPT = 2000


class CompilingError(Exception):
    """The kernels could not be compiled ahead; the message says why."""


class KernelCompiler:
    """Runs ``command`` once, which leaves the kernels in numba's cache."""

    def __init__(self, command: Sequence[str] = WARM_UP, *, timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From the event loop; further calls do nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="compile-solver")

    async def finished(self) -> None:
        """Start it if it is not, and wait until it ended, well or not: what it could not compile is compiled when it
        is needed. Waits for the time limit at most."""
        self.start()
        assert self._task is not None
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Kill the process if it runs, and see it end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        started_s = time.monotonic()
        try:
            await self._compile()
        except (CompilingError, OSError) as error:
            log.error("compiling the solver ahead failed, it is compiled when it is needed: %s", error)
        else:
            log.info("the solver's kernels are in the cache after %.1f s", time.monotonic() - started_s)

    async def _compile(self) -> None:
        # A pipe that nothing is written to: it ends when this process does, be it by SIGKILL.
        stdin, held_open = os.pipe()
        try:
            await self._compile_with(stdin)
        finally:
            os.close(stdin)
            os.close(held_open)

    async def _compile_with(self, stdin: int) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=stdin, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        log.info("compiling the solver's kernels in process %d", process.pid)
        try:
            async with asyncio.timeout(self._timeout_s):
                _, stderr = await process.communicate()
        except TimeoutError:
            raise CompilingError(f"process {process.pid} had not ended after {self._timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            said = stderr.decode(errors="replace").strip()[-_STDERR_KEPT:]
            raise CompilingError(f"process {process.pid} ended with status {process.returncode}: {said}")
