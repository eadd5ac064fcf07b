"""Constraints at the door: compiled in a process that a hostile one may kill, before an attention server sees them.

One process, at low priority, checks one constraint after the other (``mesh.constraint_worker``).
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from expertmesh.mesh.constraint import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_SOURCE_BYTES, Constraint
from expertmesh.mesh.constraint_worker import LIMITS
from expertmesh.mesh.killable_worker import BusyError, KillableWorker, LostError, TooMuchError, UnusableError
from expertmesh.router.errors import Refusal, invalid

_MAX_PENDING = 64
_KEPT = 1024
_RETRY_AFTER_MS = 1000
_REMEDIES = {
    "json_schema": "send a JSON schema with the keywords that docs/structured-output.md lists",
    "json_object": "leave it out",
    "regex": "send a regular expression without look-around and back-references",
    "grammar": "send a grammar in llguidance's Lark, with a rule `start`",
    "choice": "send other choices",
}


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
        setup = {"tokenizer": str(tokenizer_json), "vocab_size": vocab_size, "eos_token_ids": list(eos_token_ids)}
        self.worker = KillableWorker(
            "expertmesh.mesh.constraint_worker",
            setup,
            LIMITS,
            verb="compile",
            max_pending=_MAX_PENDING,
            command=command,
        )
        self._verdicts: OrderedDict[Constraint, _Verdict] = OrderedDict()
        self._checks: dict[Constraint, asyncio.Task[dict[str, Any]]] = {}

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
            # Others may wait for the same.
            check = self._checks.get(constraint) or self._start_check(constraint)
            await asyncio.wait([check])
            verdict = _verdict(check)
        verdict.enforce(constraint)

    async def close(self) -> None:
        """Give up all checks and end the process."""
        await self.worker.close()

    def _start_check(self, constraint: Constraint) -> asyncio.Task[dict[str, Any]]:
        try:
            check = self.worker.start({"kind": constraint.kind, "source": constraint.source})
        except BusyError as error:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{constraint.field}: {error} for the check of their constraints; try again later",
                retry_after_ms=_RETRY_AFTER_MS,
            ) from None
        self._checks[constraint] = check
        check.add_done_callback(lambda _: self._remember(constraint))
        return check

    def _remember(self, constraint: Constraint) -> None:
        """What was found, even where all who asked went away: it costs its time once."""
        check = self._checks.pop(constraint)
        if check.cancelled():
            return
        verdict = _verdict(check)
        if verdict.code is grpc.StatusCode.UNAVAILABLE:
            return
        self._verdicts[constraint] = verdict
        while len(self._verdicts) > _KEPT:
            self._verdicts.popitem(last=False)


def _verdict(check: asyncio.Task[dict[str, Any]]) -> _Verdict:
    """Of a check that is done. Raises CancelledError when it was given up."""
    try:
        problem = check.result()["problem"]
    except UnusableError as error:
        unusable = f"the output of this model cannot be constrained: {error}"
        return _Verdict(grpc.StatusCode.FAILED_PRECONDITION, unusable)
    except TooMuchError as error:
        problem = str(error)
    except LostError as error:
        return _Verdict(grpc.StatusCode.UNAVAILABLE, f"could not be checked ({error})")
    return _Verdict() if problem is None else _Verdict(grpc.StatusCode.INVALID_ARGUMENT, problem)


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
