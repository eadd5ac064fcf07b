"""The scenarios: what dies, what hangs, what comes and goes while tokens flow."""

from __future__ import annotations

import asyncio
import time

from chaos.outcome import tpot_ms
from chaos.stage import POLL_S, RECOVERY_TIMEOUT_S, Trial
from chaos.traffic import NUM_STREAMS, Recording, Traffic
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support import mesh_state
from support.mesh import kept_down, logs

KILLS = 5
"""Of the long version of each scenario that kills one server."""


async def expert_killed(trial: Trial, traffic: Traffic) -> None:
    """kill -9 one of the expert servers."""
    await _kill_some(trial, traffic, "expert")


async def attention_killed(trial: Trial, traffic: Traffic) -> None:
    """kill -9 one of the attention servers."""
    await _kill_some(trial, traffic, "attention")


async def _kill_some(trial: Trial, traffic: Traffic, role: str) -> None:
    for _ in range(KILLS if trial.long else 1):
        await trial.kill(trial.random.choice(mesh_state.rank_ids(trial.mesh, [role])))
        await traffic.until_flowing()


async def balancer_killed(trial: Trial, traffic: Traffic) -> None:
    """kill -9 the balancer, keep it down, start it on the same state: nobody notices, the view stays."""
    mesh, outcome = trial.mesh, trial.outcome
    before = await mesh_state.status(mesh)
    last_event = (await mesh_state.events(mesh))[-1].number
    with kept_down(mesh, "balancer"):
        await asyncio.sleep(30.0 if trial.long else 5.0)
    restarted_s, restarted_unix_s = time.monotonic(), time.time()
    await trial.until_whole()
    outcome.recovery_s.append(time.monotonic() - restarted_s)
    events = [event for event in await mesh_state.events(mesh) if event.number > last_event]
    adopted = [event.unix_s for event in events if event.kind == "view_adopted"]
    if adopted:
        outcome.figures["adopted_s"] = adopted[0] - restarted_unix_s
    else:
        outcome.figures["adopted_s"] = float("inf")
        outcome.problems.append(f"no view was adopted: {[event.kind for event in events]}")
    after = await mesh_state.status(mesh)
    if after.view_number != before.view_number:
        outcome.problems.append(f"the view changed from {before.view_number} to {after.view_number}")


async def expert_frozen(trial: Trial, traffic: Traffic) -> None:
    """SIGSTOP an expert server, SIGCONT it when the mesh has long gone on: it is fenced and comes back as new."""
    await _freeze_one(trial, "expert")


async def attention_frozen(trial: Trial, traffic: Traffic) -> None:
    """The same with an attention server: what it says when it wakes up belongs to requests that went on elsewhere."""
    await _freeze_one(trial, "attention")


async def _freeze_one(trial: Trial, role: str) -> None:
    mesh = trial.mesh
    victim = trial.random.choice(mesh_state.rank_ids(mesh, [role]))
    pid, last_event = mesh.servers[victim].pid, (await mesh_state.events(mesh))[-1].number
    await trial.freeze(victim, 10.0 if trial.long else 6.0)
    events = [event for event in await mesh_state.events(mesh) if event.number > last_event and event.subject == victim]
    kinds = [event.kind for event in events]
    trial.outcome.figures["events"] = kinds
    if mesh.servers[victim].pid != pid:
        trial.outcome.problems.append(f"{victim} died although it was only stopped")
    if not {"server_lost", "server_fenced"} & set(kinds):
        trial.outcome.problems.append(f"{victim} was not fenced: {kinds}")


async def servers_come_and_go(trial: Trial, traffic: Traffic) -> None:
    """A new expert server joins, the oldest is drained, again and again."""
    mesh, outcome = trial.mesh, trial.outcome
    quiet = await traffic.until_ended(2 * NUM_STREAMS)
    seen, joins_s, drains_s = len(traffic.recordings), list[float](), list[float]()
    for _ in range(20 if trial.long else 2):
        started_s = time.monotonic()
        await asyncio.to_thread(mesh.add, "expert")
        await trial.until_whole()
        joined_s = time.monotonic()
        await drain(mesh, mesh_state.rank_ids(mesh, ["expert"])[0])
        await trial.until_whole()
        joins_s.append(joined_s - started_s)
        drains_s.append(time.monotonic() - joined_s)
        outcome.recovery_s.append(time.monotonic() - started_s)
    await traffic.until_flowing()
    changed = [recording for recording in traffic.recordings[seen:] if recording.finish is not None]
    outcome.figures |= {"joins_s": joins_s, "drains_s": drains_s} | _tpot(quiet, changed)


def _tpot(quiet: list[Recording], changed: list[Recording]) -> dict[str, float]:
    before, during = tpot_ms(quiet, 99), tpot_ms(changed, 99)
    return {"tpot_p99_ms_quiet": before, "tpot_p99_ms": during, "tpot_ratio": during / before}


async def drain(mesh: LocalMesh, server_id: str) -> None:
    """Ask a server to leave, and wait until its process has ended by itself, with status 0."""
    starts = mesh.servers[server_id].starts
    async with rpc.open_channel(mesh.balancer, TlsConfig()) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        await stub.Drain(admin_pb2.DrainRequest(server_id=server_id), timeout=10)

    async def has_ended() -> bool:
        return mesh.servers[server_id].pid is None

    await mesh_state.until(has_ended, RECOVERY_TIMEOUT_S, lambda: f"{server_id} did not end\n{logs(mesh, 20)}", POLL_S)
    assert mesh.servers[server_id].starts == starts, f"{server_id} was started again after it had left"
    mesh.forget(server_id)


async def random_kills(trial: Trial, traffic: Traffic) -> None:
    """kill -9 something every 3 s: any rank but the last that steps in its role, or the balancer.

    A beat passes when there is nobody but the last: a killed process needs some seconds to come back.
    """
    mesh, killed = trial.mesh, list[str]()
    ends_s = time.monotonic() + (60.0 * trial.minutes if trial.long else 30.0)
    while time.monotonic() < ends_s:
        spare = await _spare(mesh)
        if spare:
            victim = trial.random.choice(["balancer", *spare])
            trial.census.look()
            mesh.kill(victim)
            killed.append(victim)
        await asyncio.sleep(3.0)
    started_s = time.monotonic()
    await trial.until_whole()
    trial.outcome.recovery_s.append(time.monotonic() - started_s)
    status = await mesh_state.status(mesh)
    trial.outcome.figures |= {
        "minutes": trial.minutes if trial.long else 0.5,
        "kills": {victim: killed.count(victim) for victim in sorted(set(killed))},
        "views": status.view_number,
        "migrations_committed": sum(e.kind == "migration_committed" for e in await mesh_state.events(mesh)),
    }


async def _spare(mesh: LocalMesh) -> list[str]:
    """Ranks in whose role another one steps as well; none while the balancer cannot say."""
    servers = mesh.servers
    stepping = sorted(await mesh_state.members(mesh, timeout_s=1.0))
    roles = [servers[server_id].role for server_id in stepping]
    return [server_id for server_id in stepping if roles.count(servers[server_id].role) > 1]
