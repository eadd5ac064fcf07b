"""The check of constraints at the door: its verdicts, what they cost, and the death of the process that makes them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import psutil
import pytest
import pytest_asyncio

from expertmesh.mesh.constraint import MAX_SOURCE_BYTES, Constraint
from expertmesh.router.constraint_check import ConstraintChecker
from expertmesh.router.errors import Refusal
from support.small_tokens import EOS, TOKENS, write_tokenizer

pytestmark = pytest.mark.slow

TIMEOUT_S = 30.0
DIGITS = Constraint("regex", "[0-9]+")
Open = Callable[..., ConstraintChecker]


@pytest_asyncio.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    """Makes checkers and closes them; no process of theirs stays."""
    before = set(psutil.Process().children())
    checkers: list[ConstraintChecker] = []

    def make(*, eos_token_ids: Sequence[int] = (EOS,), patch: str = "") -> ConstraintChecker:
        path = write_tokenizer(tmp_path / "tokenizer.json")
        command: Sequence[str] = ()
        if patch:
            script = f"import os, time, expertmesh.mesh.constraint_worker as worker\n{patch}\nworker.main()"
            command = (sys.executable, "-P", "-c", script)
        checkers.append(ConstraintChecker(path, len(TOKENS), eos_token_ids, command))
        return checkers[-1]

    yield make
    for checker in checkers:
        await asyncio.wait_for(checker.close(), TIMEOUT_S)
    assert set(psutil.Process().children()) == before


async def refusal_of(check: Awaitable[None]) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await asyncio.wait_for(check, TIMEOUT_S)
    return refused.value


async def test_verdicts_are_remembered(opened: Open) -> None:
    checker = opened()
    await asyncio.wait_for(checker.check(DIGITS), TIMEOUT_S)
    bad = Constraint("regex", "(")
    first = await refusal_of(checker.check(bad))
    assert first.code is grpc.StatusCode.INVALID_ARGUMENT
    assert first.message.startswith("sampling_params.regex: character 1: unclosed group; ")
    pid = checker.worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(checker.check(DIGITS), TIMEOUT_S)
    assert (await refusal_of(checker.check(bad))).message == first.message
    assert checker.worker.pid == pid, "nothing was checked again"
    await asyncio.wait_for(checker.check(Constraint("regex", "[a-z]+")), TIMEOUT_S)
    assert checker.worker.pid not in (pid, None), "the next one to be checked starts another process"


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("def hostile(*_):\n while True: pass", "takes more than 1 s of CPU time to compile"),
        ("hostile = lambda *_: bytearray(2**30)", "takes more than 512 MiB of memory to compile"),
        ("hostile = lambda *_: os.kill(os.getpid(), 11)", "is nested too deeply"),
        ("hostile = lambda *_: 1 / 0", "fails to compile"),
    ],
)
async def test_what_is_too_much_ends_the_process_and_nothing_else(
    opened: Open, patch: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch += "\nreal = worker.compile_constraint"
    patch += "\nworker.compile_constraint = lambda v, c: (hostile if c.source == 'bad' else real)(v, c)"
    checker = opened(patch=patch)
    attempt = asyncio.create_task(refusal_of(checker.check(Constraint("regex", "bad"))))
    same = asyncio.create_task(refusal_of(checker.check(Constraint("regex", "bad"))))
    gone = asyncio.create_task(checker.check(Constraint("regex", "bad")))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait_for(checker.check(DIGITS), TIMEOUT_S)
    refusal = await attempt
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.message.startswith(f"sampling_params.regex: {message}; ")
    assert (await same).message == refusal.message
    monkeypatch.setattr(checker.worker, "start", None)  # it costs its time once
    assert (await refusal_of(checker.check(Constraint("regex", "bad")))).message == refusal.message


async def test_a_process_that_does_not_start_says_nothing_of_the_constraint(opened: Open) -> None:
    checker = opened(patch="os._exit(7)")
    refusal = await refusal_of(checker.check(DIGITS))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    assert "status 7" in refusal.message
    assert refusal.retry_after_ms


async def test_a_model_whose_output_cannot_be_constrained(opened: Open) -> None:
    refusal = await refusal_of(opened(eos_token_ids=()).check(DIGITS))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "no end-of-sequence token" in refusal.message


async def test_size_and_number_are_bounded_without_a_process(opened: Open) -> None:
    checker = opened(patch="time.sleep(60)")
    large = await refusal_of(checker.check(Constraint("grammar", "x" * (MAX_SOURCE_BYTES + 1))))
    assert large.code is grpc.StatusCode.INVALID_ARGUMENT
    assert checker.worker.pid is None
    waiting = [asyncio.create_task(checker.check(Constraint("regex", f"a{n}"))) for n in range(64)]
    await asyncio.sleep(0)
    crowded = await refusal_of(checker.check(DIGITS))
    assert crowded.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
