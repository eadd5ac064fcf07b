"""Questions to the placement policy: values that go to the worker thread and come back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from expertmesh.balancer.policy import LayerStatistics, Layout, PlacementPolicy, Proposal, Quotas
from expertmesh.balancer.replicas import ANY_REPLICAS, ReplicaRule
from expertmesh.balancer.source_quotas import with_quotas
from expertmesh.mesh.background import only_idle_cores

log = logging.getLogger(__name__)

EVALUATION_TIMEOUT_S = 300.0
"""The first one of an installation compiles the solver, which takes minutes on a busy machine; then it is
milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerQuestion:
    """``version``, ``slots`` (global slot → expert) and ``quotas`` of sources: of the placement in force."""

    layer: int
    version: int
    slots: tuple[int, ...]
    statistics: LayerStatistics
    quotas: Quotas = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Layers of one view to find better placements for; ``max_loads`` as for ``PlacementPolicy.propose``."""

    number: int
    view_number: int
    layout: Layout
    max_loads: int | None
    layers: tuple[LayerQuestion, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """By layer: the proposals, and why there is none where the policy refused. ``seconds``: on the worker."""

    job: Job
    proposals: dict[int, Proposal]
    refusals: dict[int, str]
    seconds: float


def answer(policy: PlacementPolicy, job: Job) -> Answer:
    """Ask for every layer of the job."""
    started_s = time.monotonic()
    proposals: dict[int, Proposal] = {}
    refusals: dict[int, str] = {}
    for asked in job.layers:
        try:
            proposal = policy.propose(asked.statistics, job.layout, asked.slots, job.max_loads)
            proposals[asked.layer] = with_quotas(proposal, asked.statistics, job.layout, asked.slots, asked.quotas)
        except ValueError as error:
            refusals[asked.layer] = str(error)
    return Answer(job=job, proposals=proposals, refusals=refusals, seconds=time.monotonic() - started_s)


class EvaluationWorker:
    """One thread that the policy runs on: solves wait for one another, and nothing else waits for them.

    Args:
        make_policy: called on the thread at ``warm_up`` or the first job: it may take long.
        prepare: awaited before that, at every job: what can be done without the thread.
    """

    def __init__(
        self, make_policy: Callable[[], PlacementPolicy], prepare: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._make_policy = make_policy
        self._prepare = prepare
        self._policy: PlacementPolicy | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="placement", initializer=only_idle_cores)
        self._warming: asyncio.Task[None] | None = None

    async def ask(self, job: Job) -> Answer:
        """
        Raises:
            Exception: whatever the policy raised beside ValueError, which becomes a refusal.
        """
        if self._prepare is not None:
            await self._prepare()
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, job)

    def warm_up(self) -> None:
        """Make the policy already, so that the first job does not have to wait for it. A failure is the first job's."""
        self._warming = asyncio.create_task(self._warm(), name="warm-placement-policy")

    async def _warm(self) -> None:
        if self._prepare is not None:
            await self._prepare()
        self._pool.submit(self._ready_policy)

    def _answer(self, job: Job) -> Answer:
        return answer(self._ready_policy(), job)

    def _ready_policy(self) -> PlacementPolicy:
        if self._policy is None:
            self._policy = self._make_policy()
        return self._policy

    async def close(self) -> None:
        """Waits for no solve: one that runs ends by itself, and nobody hears of it."""
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)


class Evaluations:
    """The jobs of the online loop: one at a time, from the loop to the worker and back.

    ``on_answer`` is set before the first job.
    """

    def __init__(self, worker: EvaluationWorker) -> None:
        self._worker = worker
        self._task: asyncio.Task[None] | None = None
        self.on_answer: Callable[[Answer], None]

    def start(self, job: Job) -> None:
        assert self._task is None or self._task.done(), "one job at a time"
        self._task = asyncio.create_task(self._run(job), name=f"evaluation-{job.number}")

    async def _run(self, job: Job) -> None:
        try:
            found = await self._worker.ask(job)
        except Exception as error:  # a policy that fails must not take the control plane along
            log.exception("the placement policy failed")
            why = f"{type(error).__name__}: {error}"
            found = Answer(job=job, proposals={}, refusals={asked.layer: why for asked in job.layers}, seconds=0.0)
        self.on_answer(found)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def solver_policy(max_filled: int | None = None, *, rule: ReplicaRule = ANY_REPLICAS) -> PlacementPolicy:
    """The solver of this package, compiled; arguments as for ``SolverPolicy``."""
    from expertmesh.balancer.policy_solver import SolverPolicy

    started_s = time.monotonic()
    policy = SolverPolicy(max_filled=max_filled, rule=rule)
    policy.compile()
    log.info("the solver is ready after %.1f s", time.monotonic() - started_s)
    return policy


def eplb_policy(max_filled: int | None = None, *, rule: ReplicaRule = ANY_REPLICAS) -> PlacementPolicy:
    """DeepSeek's EPLB, ready to run; arguments as for ``solver_policy``."""
    from expertmesh.balancer.policy_eplb import EplbPolicy

    policy = EplbPolicy(max_filled=max_filled, rule=rule)
    policy.compile()
    return policy
