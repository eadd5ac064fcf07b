"""Two routers in front of one mesh: what happens to one is nothing to the other's clients."""

from __future__ import annotations

import asyncio
import signal
import time

from chaos.stage import RECOVERY_TIMEOUT_S, Trial
from chaos.traffic import Recording, Traffic
from support.second_router import SecondRouter, second_router

NUM_STREAMS = 8
"""Of the second router; the first one has as many as in every scenario."""


async def router_killed(trial: Trial, traffic: Traffic) -> None:
    """kill -9 one of two routers: its streams end with UNAVAILABLE, at once; then SIGTERM: its streams end whole."""
    async with second_router(trial.mesh, "router-1") as router:
        broken = await _until_it_ends(trial, traffic, router, signal.SIGKILL)
    async with second_router(trial.mesh, "router-2") as router:
        finished = await _until_it_ends(trial, traffic, router, signal.SIGTERM)
        status = await asyncio.wait_for(router.process.wait(), RECOVERY_TIMEOUT_S)
    problems = trial.outcome.problems
    if status:
        problems.append(f"the router that was asked to stop ended with {status}")
    if not any(recording.is_lost for recording in broken):
        problems.append("the router that was killed had no stream")
    problems += _unexpected(broken, "the killed router's stream ended with", "UNAVAILABLE")
    # What was sent when it had begun to stop was refused before it began: nothing is half done.
    problems += [
        f"the stopping router ended a stream after {len(recording.token_ids)} tokens: {recording.error}"
        for recording in finished
        if recording.is_lost and recording.token_ids
    ]
    problems += _unexpected(finished, "the stopping router refused with", "UNAVAILABLE")
    wrong = sum(recording.is_wrong for recording in (*broken, *finished))
    if wrong:
        problems.append(f"{wrong} streams of the second routers had a wrong token")


def _unexpected(recordings: list[Recording], what: str, code: str) -> list[str]:
    errors = {recording.error for recording in recordings if recording.error}
    return [f"{what} {error}" for error in sorted(errors) if not error.startswith(code)]


async def _until_it_ends(
    trial: Trial, traffic: Traffic, router: SecondRouter, number: signal.Signals
) -> list[Recording]:
    """Streams through a router that gets a signal in the middle of them; returns them all."""
    async with Traffic(router.address, trial.asked, trial.outcome.seed, num_streams=NUM_STREAMS) as second:
        await second.until_flowing()
        started_s = time.monotonic()
        router.process.send_signal(number)
        await second.stop()
        trial.outcome.recovery_s.append(time.monotonic() - started_s)
    await traffic.until_flowing()
    return second.recordings
