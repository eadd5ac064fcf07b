"""Two balancers that share an etcd: the one that leads dies or hangs, or etcd itself goes away for a while."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from chaos.faults import KILLS
from chaos.stage import POLL_S, RECOVERY_TIMEOUT_S, Trial
from chaos.traffic import Traffic
from expertmesh.balancer.standby import LEADER_KEY
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support import mesh_state

CONFIG = {"balancer__state": "etcd", "balancer__servers": 2, "attention__servers": 1, "expert__servers": 2}
OUTAGE_S = 10.0
_ASK_TIMEOUT_S = 0.5


async def leader_killed(trial: Trial, traffic: Traffic) -> None:
    """kill -9 the leader: the other one takes its mesh over, in the same view, and leads it through a death."""
    mesh, outcome = trial.mesh, trial.outcome
    takeovers_s: list[float] = []
    for _ in range(KILLS if trial.long else 1):
        leader, before = await _leader(mesh), await mesh_state.status(mesh)
        await _until_others_stand_by(mesh, leader)
        last_event = (await mesh_state.events(mesh))[-1].number
        trial.census.look()
        killed_unix_s = time.time()
        mesh.kill(leader)
        adopted = await _next_event(mesh, "view_adopted", last_event)
        takeovers_s.append(adopted.unix_s - killed_unix_s)
        leads = [
            e.subject for e in await mesh_state.events(mesh) if e.number > last_event and e.kind == "balancer_leads"
        ]
        if not leads or leads[0] == leader:
            outcome.problems.append(f"{leader} was killed, and {leads} led then")
        after = await mesh_state.status(mesh)
        if after.view_number != before.view_number:
            outcome.problems.append(f"the view changed from {before.view_number} to {after.view_number}")
        await trial.until_whole()
        outcome.recovery_s.append(time.time() - killed_unix_s)
        await traffic.until_flowing()
    outcome.figures |= {"takeover_s": max(takeovers_s), "takeovers_s": takeovers_s}
    if trial.long:
        await trial.kill(trial.random.choice(mesh_state.rank_ids(mesh, ["expert"])))


async def leader_frozen(trial: Trial, traffic: Traffic) -> None:
    """SIGSTOP the leader until the other one leads, SIGCONT it: it leads no more, not for a moment."""
    mesh, outcome = trial.mesh, trial.outcome
    leader, before = await _leader(mesh), await mesh_state.status(mesh)
    await _until_others_stand_by(mesh, leader)
    async with _answers(mesh) as answers:
        await mesh_state.until(answers.any, RECOVERY_TIMEOUT_S, lambda: f"{leader} does not answer", POLL_S)
        mesh.kill(leader, signal.SIGSTOP)
        try:
            await asyncio.sleep(OUTAGE_S if trial.long else 0.0)
            await mesh_state.until(answers.several, RECOVERY_TIMEOUT_S, lambda: "no other one leads", POLL_S)
        finally:
            mesh.kill(leader, signal.SIGCONT)
        woken_s = time.monotonic()

        async def has_stepped_down() -> bool:
            gauges = await asyncio.to_thread(mesh_state.metrics, mesh, leader)
            return gauges["expertmesh_balancer_leader"] == 0.0

        await mesh_state.until(has_stepped_down, RECOVERY_TIMEOUT_S, lambda: f"{leader} still leads", POLL_S)
        outcome.figures["stepped_down_s"] = time.monotonic() - woken_s
        await trial.until_whole()
        outcome.recovery_s.append(time.monotonic() - woken_s)
    if len(answers.ids) != 2 or answers.ids[0] != leader:
        outcome.problems.append(f"{leader} led and hung; as leaders answered, in turn: {answers.ids}")
    log = (mesh.state_dir / f"{leader}.log").read_text(encoding="utf-8", errors="replace")
    if "is over: its lease" not in log:
        outcome.problems.append(f"{leader} does not say that its term is over")
    after = await mesh_state.status(mesh)
    outcome.figures["views"] = [before.view_number, after.view_number]


async def etcd_restarted(trial: Trial, traffic: Traffic) -> None:
    """etcd goes away for longer than a lease: nobody leads, tokens flow; then somebody leads again, the view stays."""
    mesh, outcome, etcd = trial.mesh, trial.outcome, trial.etcd
    assert etcd is not None, "the scenario's configuration asks for one"
    before = await mesh_state.status(mesh)
    last_event = (await mesh_state.events(mesh))[-1].number
    await asyncio.to_thread(etcd.stop)
    try:

        async def nobody_leads() -> bool:
            return await mesh_state.leader(mesh, timeout_s=_ASK_TIMEOUT_S) is None

        await mesh_state.until(nobody_leads, RECOVERY_TIMEOUT_S, lambda: "somebody leads without etcd", POLL_S)
        await asyncio.sleep(OUTAGE_S if trial.long else 0.0)
        await traffic.until_flowing()
        if not await nobody_leads():
            outcome.problems.append("somebody leads without etcd")
    finally:
        await asyncio.to_thread(etcd.start)
    started_s = time.monotonic()
    await _next_event(mesh, "view_adopted", last_event)
    await trial.until_whole()
    outcome.recovery_s.append(time.monotonic() - started_s)
    after = await mesh_state.status(mesh)
    if after.view_number != before.view_number:
        outcome.problems.append(f"the view changed from {before.view_number} to {after.view_number}")


async def _leader(mesh: LocalMesh) -> str:
    """The id of the balancer that leads."""
    address = await mesh_state.leader(mesh, timeout_s=RECOVERY_TIMEOUT_S)
    return next(server.id for server in mesh.servers.values() if server.address == address)


async def _until_others_stand_by(mesh: LocalMesh, leader: str) -> None:
    """Until every other balancer knows who leads, and so is ready to follow: one that was killed has to start first."""
    address = mesh.servers[leader].address
    for server in mesh.servers.values():
        if server.role == "balancer" and server.id != leader:
            assert server.address is not None, "it has been ready before"

            async def names_the_leader(asked: str = server.address) -> bool:
                return await _leader_named_by(asked) == address

            await mesh_state.until(names_the_leader, RECOVERY_TIMEOUT_S, lambda: "nobody stands by", POLL_S)


async def _leader_named_by(address: str) -> str | None:
    """What a balancer that stands by says; None of one that leads, or does not answer."""
    async with rpc.open_channel(address, TlsConfig()) as channel:
        try:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_ASK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            named = {key: str(value) for key, value in error.trailing_metadata() or ()}
            return named.get(LEADER_KEY)
    return None


async def _next_event(mesh: LocalMesh, kind: str, after: int) -> admin_pb2.ListEventsResponse:
    """The first of a kind with a greater number, as soon as whoever leads then knows it."""
    found: list[admin_pb2.ListEventsResponse] = []

    async def has_come() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError, AssertionError):  # nobody leads
            found.extend(e for e in await mesh_state.events(mesh) if e.kind == kind and e.number > after)
        return bool(found)

    await mesh_state.until(has_come, RECOVERY_TIMEOUT_S, lambda: f"no event {kind} after number {after}", POLL_S)
    return found[0]


@dataclass
class _Answers:
    """Who answered as leader, in the order of the answers; one that answers again and again counts once."""

    ids: list[str] = field(default_factory=list)

    def add(self, server_id: str) -> None:
        if not self.ids or self.ids[-1] != server_id:
            self.ids.append(server_id)

    async def any(self) -> bool:
        return bool(self.ids)

    async def several(self) -> bool:
        return len(self.ids) > 1


@contextlib.asynccontextmanager
async def _answers(mesh: LocalMesh) -> AsyncIterator[_Answers]:
    """Asks every balancer again and again, for as long as the block runs; only a leader answers."""
    answers = _Answers()
    async with asyncio.TaskGroup() as group:
        asking = [
            group.create_task(_ask_on(server.id, server.address, answers))
            for server in mesh.servers.values()
            if server.role == "balancer" and server.address is not None
        ]
        try:
            yield answers
        finally:
            for task in asking:
                task.cancel()


async def _ask_on(server_id: str, address: str, answers: _Answers) -> None:
    async with rpc.open_channel(address, TlsConfig()) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_ASK_TIMEOUT_S)
                answers.add(server_id)
            await asyncio.sleep(POLL_S)
