"""Constraints at the door: compiled in a process that a hostile one may kill, before an attention server sees them.

One process, at low priority, checks one constraint after the other; its own limits (``mesh.constraint_worker``) end it
when one is too much, and the next check starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from expertmesh.mesh.constraint import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_SOURCE_BYTES, Constraint
from expertmesh.mesh.constraint_worker import CPU_LIMIT_S, MEMORY_LIMIT_BYTES
from expertmesh.router.errors import Refusal, invalid

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
"""Of one check: the process ends itself long before, unless it gets no CPU time at all."""

_START_TIMEOUT_S = 60.0
_MAX_PENDING = 64
_KEPT = 1024
_RETRY_AFTER_MS = 1000
_TOO_MUCH = {
    -signal.SIGPROF: f"takes more than {CPU_LIMIT_S:g} s of CPU time to compile",
    -signal.SIGABRT: f"takes more than {MEMORY_LIMIT_BYTES >> 20} MiB of memory to compile",
    -signal.SIGSEGV: "is nested too deeply",
    1: "cannot be compiled",
}
_REMEDIES = {
    "json_schema": "send a JSON schema with the keywords that docs/structured-output.md lists",
    "json_object": "leave it out",
    "regex": "send a regular expression without look-around and back-references",
    "grammar": "send a grammar in llguidance's Lark, with a rule `start`",
    "choice": "send other choices",
}


class _TooMuchError(Exception):
    """The process ended because of what it was to check; the message says how."""


class _LostError(Exception):
    """The process ended or did not answer, which says nothing of what it was to check."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a check found; ``code`` OK = nothing."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    problem: str = ""

    def enforce(self, constraint: Constraint) -> None:
        """Raises the Refusal of the constraint, if there is one."""
        match self.code:
            case grpc.StatusCode.OK:
                return
            case grpc.StatusCode.INVALID_ARGUMENT:
                raise invalid(constraint.field, self.problem, _REMEDIES[constraint.kind])
            case grpc.StatusCode.UNAVAILABLE:
                message = f"{constraint.field}: {self.problem}; try again later"
                raise Refusal(self.code, message, retry_after_ms=_RETRY_AFTER_MS)
        raise Refusal(self.code, f"{constraint.field}: {self.problem}; leave it out")


class ConstraintChecker:
    """Whether constraints can be compiled, remembered for those checked last. Runs on the event loop; ``close`` it.

    Args:
        command: of the worker, for tests.
    """

    def __init__(
        self, tokenizer_json: Path, vocab_size: int, eos_token_ids: Sequence[int], command: Sequence[str] = ()
    ) -> None:
        arguments = (str(tokenizer_json), str(vocab_size), json.dumps(list(eos_token_ids)))
        self._command = command or (sys.executable, "-P", "-m", "expertmesh.mesh.constraint_worker", *arguments)
        self._verdicts: OrderedDict[Constraint, _Verdict] = OrderedDict()
        self._checks: dict[Constraint, asyncio.Task[_Verdict]] = {}
        self._turn = asyncio.Lock()
        self._worker: asyncio.subprocess.Process | None = None

    async def check(self, constraint: Constraint) -> None:
        """Returns when attention servers may compile it.

        Raises:
            Refusal: INVALID_ARGUMENT when it is not valid or takes too much; FAILED_PRECONDITION when the output of
                this model cannot be constrained; RESOURCE_EXHAUSTED when too many others wait.
        """
        _check_size(constraint)
        if constraint in self._verdicts:
            self._verdicts.move_to_end(constraint)
            verdict = self._verdicts[constraint]
        else:
            # Others may wait for the same; who goes away does not leave half an answer in the pipe.
            verdict = await asyncio.shield(self._checks.get(constraint) or self._start_check(constraint))
        verdict.enforce(constraint)

    async def close(self) -> None:
        """Give up all checks and end the process."""
        checks = list(self._checks.values())
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        await self._kill()

    def _start_check(self, constraint: Constraint) -> asyncio.Task[_Verdict]:
        if len(self._checks) >= _MAX_PENDING:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{constraint.field}: {_MAX_PENDING} other constraints wait for their check; try again later",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        task = asyncio.create_task(self._check(constraint), name=f"check {constraint.field}")
        self._checks[constraint] = task
        task.add_done_callback(lambda _: self._checks.pop(constraint, None))
        return task

    async def _check(self, constraint: Constraint) -> _Verdict:
        async with self._turn:
            try:
                verdict = await self._ask_worker(constraint)
            except _LostError as error:
                log.warning("the process that checks constraints is lost, another one is started: %s", error)
                try:
                    verdict = await self._ask_worker(constraint)
                except _LostError as again:
                    return _Verdict(grpc.StatusCode.UNAVAILABLE, f"could not be checked ({again})")
        self._verdicts[constraint] = verdict
        while len(self._verdicts) > _KEPT:
            self._verdicts.popitem(last=False)
        return verdict

    async def _ask_worker(self, constraint: Constraint) -> _Verdict:
        try:
            worker, unusable = await self._open_worker()
            if unusable:
                problem = f"the output of this model cannot be constrained: {unusable}"
                return _Verdict(grpc.StatusCode.FAILED_PRECONDITION, problem)
            wrong = await self._ask(worker, constraint)
        except _TooMuchError as error:
            log.warning("%s: %s", constraint.field, error)
            wrong = str(error)
        except BaseException:
            await self._kill()
            raise
        return _Verdict() if wrong is None else _Verdict(grpc.StatusCode.INVALID_ARGUMENT, wrong)

    async def _open_worker(self) -> tuple[asyncio.subprocess.Process, str | None]:
        """The process, and why it cannot be used, if so."""
        worker = self._worker
        if worker is not None and worker.returncode is None:
            return worker, None
        try:
            self._worker = worker = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            return worker, await self._answer(worker, _START_TIMEOUT_S)
        except (OSError, _TooMuchError) as error:
            raise _LostError(f"it does not start: {error}") from None

    async def _ask(self, worker: asyncio.subprocess.Process, constraint: Constraint) -> str | None:
        assert worker.stdin is not None, "it was opened with a pipe"
        line = json.dumps({"kind": constraint.kind, "source": constraint.source}) + "\n"
        with contextlib.suppress(ConnectionError):  # it is gone: reading says so
            worker.stdin.write(line.encode())
            await asyncio.wait_for(worker.stdin.drain(), _TIMEOUT_S)
        return await self._answer(worker, _TIMEOUT_S)

    async def _answer(self, worker: asyncio.subprocess.Process, timeout_s: float) -> str | None:
        assert worker.stdout is not None, "it was opened with a pipe"
        try:
            line = await asyncio.wait_for(worker.stdout.readline(), timeout_s)
            status = 0 if line else await asyncio.wait_for(worker.wait(), timeout_s)
        except TimeoutError:
            raise _LostError(f"no answer within {timeout_s:g} s") from None
        if not line:
            if status in _TOO_MUCH:
                raise _TooMuchError(_TOO_MUCH[status])
            raise _LostError(f"it ended with status {status}")
        problem: str | None = json.loads(line)["problem"]
        return problem

    async def _kill(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()  # it was killed: this ends


def _check_size(constraint: Constraint) -> None:
    if constraint.kind == "choice":
        choices = json.loads(constraint.source)
        if not choices or len(choices) > MAX_CHOICES:
            raise invalid(constraint.field, f"has {len(choices)} choices", f"send 1 to {MAX_CHOICES}")
        for index, choice in enumerate(choices):
            if not choice or len(choice) > MAX_CHOICE_CHARS:
                problem = f"has {len(choice)} characters"
                raise invalid(f"{constraint.field}.choices[{index}]", problem, f"use 1 to {MAX_CHOICE_CHARS}")
    num_bytes = len(constraint.source.encode())
    if num_bytes > MAX_SOURCE_BYTES:
        raise invalid(constraint.field, f"has {num_bytes} bytes", f"send at most {MAX_SOURCE_BYTES}")
    if not constraint.source:
        raise invalid(constraint.field, "is empty", "leave it out")
