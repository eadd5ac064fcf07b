"""Ten times the load that a mesh can bear: what it admits it serves at full speed, the rest is told why and when."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from chaos.memory import MemoryWatch
from chaos.stage import Trial
from chaos.traffic import Question
from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc

NUM_TOKENS = 24
SEQUENCES = 8  # in a step, over both attention servers
PLACES = 24  # in the router
CONFIG = {"attention__max_num_seqs": SEQUENCES // 2, "router__max_queued_requests": PLACES}
TIMES = 10
LEAST_GOODPUT = 0.5
"""Of the capacity, on any machine: turning nine of ten requests away takes CPU time from the mesh where both and their
client share two cores."""
DEADLINE_S = 60.0
PACE_S = 0.01
MODEST_SHARE = 0.1
"""Of the arrivals come from one tenant, the others from another: with fair shares it gets far more of the service."""


@dataclass
class Tally:
    """What became of requests. ``tpot_ms``: of those that were served, as their client saw it."""

    sent: int = 0
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    num_wrong: int = 0
    hints_ms: list[int] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)

    async def ask(self, stub: generate_pb2_grpc.GenerationServiceStub, question: Question, tenant: str) -> None:
        request = build_request(question.prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, tenant=tenant)
        self.sent += 1
        token_ids, arrived_s = list[int](), list[float]()
        try:
            async for message in stub.Generate(request, timeout=DEADLINE_S):
                token_ids += message.token_ids
                arrived_s.append(time.monotonic())
        except grpc.aio.AioRpcError as error:
            self._take_refusal(error, tenant)
            return
        self.served[tenant] += 1
        self.num_wrong += tuple(token_ids) != question.answer[:NUM_TOKENS]
        self.tpot_ms.append(1e3 * (arrived_s[-1] - arrived_s[0]) / (NUM_TOKENS - 1))

    def _take_refusal(self, error: grpc.aio.AioRpcError, tenant: str) -> None:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            self.lost.append(f"{error.code().name}: {error.details()}")
            return
        hint = dict(error.trailing_metadata() or ()).get("retry-after-ms")
        if hint is None or "try again in" not in (error.details() or ""):
            self.unexplained.append(f"{error.details()} (retry-after-ms {hint})")
            return
        self.hints_ms.append(int(hint))
        self.refused[tenant] += 1


async def overload(trial: Trial) -> None:
    """A closed loop that takes every place in the batches and leaves nobody waiting; then ``TIMES`` the arrivals."""
    closed_s, open_s = (15.0, 120.0) if trial.long else (4.0, 6.0)
    await _overload(trial, closed_s, open_s, None)


async def soak(trial: Trial) -> None:
    """The same for ten minutes, with an eye on the memory of every process."""
    await _overload(trial, 15.0, 60.0 * trial.minutes, MemoryWatch(trial.mesh))


async def _overload(trial: Trial, closed_s: float, open_s: float, memory: MemoryWatch | None) -> None:
    async with rpc.open_channel(trial.mesh.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        capacity, alone = await _closed_loop(stub, trial.asked, closed_s)
        watching = asyncio.create_task(memory.watch()) if memory is not None else None
        try:
            goodput, crowded = await _open_loop(stub, trial.asked, TIMES * capacity, open_s)
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    _report(trial, alone, crowded, capacity, goodput)
    if memory is not None:
        trial.outcome.figures["memory"] = memory.figures()
        trial.outcome.problems += memory.growths()


async def _closed_loop(
    stub: generate_pb2_grpc.GenerationServiceStub, asked: Sequence[Question], seconds: float
) -> tuple[float, Tally]:
    """Requests a second with every sequence of the mesh taken and nobody waiting."""
    tally, started_s = Tally(), time.monotonic()

    async def again(index: int) -> None:
        while time.monotonic() - started_s < seconds:
            await tally.ask(stub, asked[index % len(asked)], "steady")
            index += 1

    async with asyncio.TaskGroup() as group:
        for first in range(SEQUENCES):
            group.create_task(again(first))
    return tally.served.total() / (time.monotonic() - started_s), tally


async def _open_loop(
    stub: generate_pb2_grpc.GenerationServiceStub, asked: Sequence[Question], rate: float, seconds: float
) -> tuple[float, Tally]:
    """Arrivals at ``rate`` a second whatever becomes of them; returns served requests a second."""
    tally, started_s, sent = Tally(), time.monotonic(), 0
    async with asyncio.TaskGroup() as group:
        while (elapsed_s := time.monotonic() - started_s) < seconds:
            while sent < rate * elapsed_s:
                tenant = "modest" if sent % round(1 / MODEST_SHARE) == 0 else "greedy"
                group.create_task(tally.ask(stub, asked[sent % len(asked)], tenant))
                sent += 1
            await asyncio.sleep(PACE_S)  # of the arrivals
    return tally.served.total() / (time.monotonic() - started_s), tally


def _report(trial: Trial, alone: Tally, crowded: Tally, capacity: float, goodput: float) -> None:
    outcome = trial.outcome
    outcome.requests = alone.sent + crowded.sent
    outcome.lost = len(alone.lost) + len(crowded.lost)
    outcome.wrong = alone.num_wrong + crowded.num_wrong
    outcome.tokens = NUM_TOKENS * (alone.served.total() + crowded.served.total())
    outcome.problems += [f"a request ended with {error}" for error in sorted({*alone.lost, *crowded.lost})[:5]]
    outcome.problems += [f"a refusal does not say what to do: {text}" for text in crowded.unexplained[:5]]
    if alone.refused:
        outcome.problems.append(f"{alone.refused.total()} requests were refused although nobody waited")
    if crowded.refused.total() < crowded.served.total():
        outcome.problems.append("more was served than refused: this was no overload")
    quiet_ms, crowded_ms = float(np.median(alone.tpot_ms)), float(np.median(crowded.tpot_ms))
    outcome.figures |= {
        "capacity_requests_per_s": capacity,
        "goodput_requests_per_s": goodput,
        "lost_goodput": 1 - goodput / capacity,
        "served": dict(crowded.served),
        "refused": dict(crowded.refused),
        "modest_tenant_share": crowded.served["modest"] / max(1, crowded.served.total()),
        "retry_hints_ms": [min(crowded.hints_ms, default=0), max(crowded.hints_ms, default=0)],
        "tpot_ms_median_alone": quiet_ms,
        "tpot_ms_median": crowded_ms,
        "tpot_ratio": crowded_ms / quiet_ms,
    }
    if goodput < LEAST_GOODPUT * capacity:
        outcome.problems.append(f"{goodput:.1f} requests/s were served, of a capacity of {capacity:.1f}")
    if outcome.figures["modest_tenant_share"] < 2 * MODEST_SHARE:
        outcome.problems.append("the modest tenant got no fair share")
