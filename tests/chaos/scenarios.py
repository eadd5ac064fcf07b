"""The list of scenarios, and how one is played."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos import faults, leaders, network, overload, routers
from chaos.outcome import Outcome, Targets
from chaos.stage import RECOVERY_TIMEOUT_S, Stage, Trial
from chaos.traffic import Question, Traffic
from support import etcd, mesh_state

QUIET_S, SHORT_QUIET_S = 5.0, 2.0
"""Of undisturbed traffic before the first fault, to compare with."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One line of the table.

    Attributes:
        play: does the damage while the usual traffic runs, and returns when the mesh is whole again.
        load: instead of ``play``: brings requests of its own, and reports on them.
        config: as ``mesh_config`` takes it.
        replays: requests have to be replayed, or the damage was none.
        apart: it needs a network of its own (``chaos.network``).
        long_only: the CI does not play it.
    """

    name: str
    play: Callable[[Trial, Traffic], Awaitable[None]] | None = None
    load: Callable[[Trial], Awaitable[None]] | None = None
    targets: Targets
    config: dict[str, Any] = field(default_factory=dict)
    replays: bool = False
    apart: bool = False
    long_only: bool = False

    def why_not(self) -> str | None:
        """Why it cannot be played on this machine; None when it can."""
        if self.config.get("balancer__state") == "etcd":
            return etcd.why_not()
        return network.why_not() if self.apart else None


SCENARIOS = (
    Scenario(
        name="expert-killed-replicated",
        play=faults.expert_killed,
        targets=Targets(longest_gap_s=1.0),
        config={"expert__num_slots": 64},
    ),
    Scenario(name="expert-killed", play=faults.expert_killed, targets=Targets(longest_gap_s=2.0)),
    Scenario(name="attention-killed", play=faults.attention_killed, targets=Targets(longest_gap_s=1.5), replays=True),
    Scenario(name="balancer-killed", play=faults.balancer_killed, targets=Targets(longest_gap_s=1.0, adopted_s=2.0)),
    # A server that hangs or is cut off is given up when its lease ends: the pause is balancer.lease_s and a bit.
    Scenario(name="expert-frozen", play=faults.expert_frozen, targets=Targets()),
    Scenario(name="attention-frozen", play=faults.attention_frozen, targets=Targets(), replays=True),
    Scenario(name="servers-come-and-go", play=faults.servers_come_and_go, targets=Targets(tpot_ratio=2.0)),
    Scenario(
        name="leader-killed",
        play=leaders.leader_killed,
        targets=Targets(longest_gap_s=1.0, takeover_s=3.0),
        config=leaders.CONFIG,
    ),
    Scenario(
        name="leader-frozen", play=leaders.leader_frozen, targets=Targets(longest_gap_s=1.0), config=leaders.CONFIG
    ),
    Scenario(
        name="etcd-restarted", play=leaders.etcd_restarted, targets=Targets(longest_gap_s=1.0), config=leaders.CONFIG
    ),
    Scenario(name="router-killed", play=routers.router_killed, targets=Targets(longest_gap_s=1.0)),
    Scenario(
        name="random-kills",
        play=faults.random_kills,
        targets=Targets(),
        # One request may well lose more than the three servers that are enough for ordinary times.
        config={"balancer__mode": "online", "router__replay_attempts": 100},
    ),
    Scenario(
        name="overload",
        load=overload.overload,
        targets=Targets(lost_goodput=0.1, tpot_ratio=1.5),
        config=overload.CONFIG,
    ),
    Scenario(
        name="soak",
        load=overload.soak,
        targets=Targets(lost_goodput=0.1, tpot_ratio=1.5),
        config=overload.CONFIG,
        long_only=True,
    ),
    Scenario(name="network-cut", play=network.network_cut, targets=Targets(), replays=True, apart=True, long_only=True),
)


async def play(
    scenario: Scenario,
    stage: Stage,
    asked: Sequence[Question],
    *,
    seed: int,
    long: bool,
    following: Scenario | None,
    minutes: float = 10.0,
) -> Outcome:
    """Play one scenario. Its mesh is left to the ``following`` one if that wants the same; else what it leaves behind
    when it stops belongs to the outcome."""
    outcome = Outcome(scenario=scenario.name, seed=seed, long=long, targets=scenario.targets)
    mesh, census = await stage.set(scenario.config)
    trial = Trial(
        mesh=mesh,
        census=census,
        asked=asked,
        outcome=outcome,
        random=random.Random(f"{seed} {scenario.name}"),
        long=long,
        minutes=minutes,
        etcd=stage.etcd,
    )
    try:
        await _play(scenario, trial)
    except Exception as error:  # noqa: BLE001 - the others are played all the same
        outcome.problems.append(f"it broke off: {type(error).__name__}: {error}")
    if outcome.problems or following is None or following.config != scenario.config:
        outcome.problems += await stage.clear()
    return outcome


async def _play(scenario: Scenario, trial: Trial) -> None:
    mesh, outcome = trial.mesh, trial.outcome
    await trial.until_whole()
    if scenario.load is not None:
        await scenario.load(trial)
    else:
        await _disturb(scenario, trial)
    await mesh_state.until_idle(mesh, RECOVERY_TIMEOUT_S)
    outcome.problems += trial.census.leaks_running()


async def _disturb(scenario: Scenario, trial: Trial) -> None:
    assert scenario.play is not None, f"{scenario.name} does nothing"
    mesh, outcome = trial.mesh, trial.outcome
    async with Traffic(mesh.router, trial.asked, outcome.seed) as traffic:
        await traffic.until_flowing()
        await asyncio.sleep(QUIET_S if trial.long else SHORT_QUIET_S)
        faults_s = time.monotonic()
        try:
            await scenario.play(trial, traffic)
            await traffic.until_flowing()
        finally:
            ended_s = time.monotonic()
            await traffic.stop()
            outcome.count(traffic.recordings, faults_s, ended_s)
    if scenario.replays and not outcome.replays:
        outcome.problems.append("no request was replayed: the servers concerned held none")
