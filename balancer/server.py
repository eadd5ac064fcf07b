"""The balancer as a process: its turns at leading, its port, the rendezvous store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from expertmesh.balancer.admin_service import AdminServicer
from expertmesh.balancer.leading import Leading
from expertmesh.balancer.placement_file import PlacementFile, read_placement_file
from expertmesh.balancer.standby import NotLeadingError, Switchboard
from expertmesh.balancer.state import fresh_state
from expertmesh.balancer.store import RendezvousStore
from expertmesh.balancer.turns import Turn, Turns, open_turns
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.gate import Gate
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.v1 import admin_pb2, mesh_pb2

log = logging.getLogger(__name__)

_SERVICES = (
    mesh_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
_STOP_GRACE_S = 0.5
_REBIND_TIMEOUT_S = 10.0
_REBIND_PAUSE_S = 0.1
_UNREADABLE_PAUSE_S = 1.0


async def serve(
    config: MeshConfig,
    *,
    server_id: str,
    stop: asyncio.Event,
    ready: Callable[[str], None],
    telemetry: Telemetry,
) -> None:
    """Be the mesh's balancer until ``stop`` is set; stand by while another one is.

    Args:
        ready: called with ``host:port`` as soon as servers can register, or stands by for that.

    Raises:
        UserError: the port, the state folder, etcd, the data plane's interface or the placement file cannot be used.
    """
    gate = Gate(config.tls, config.api, server_id)
    async with gate.open(), open_turns(config, server_id) as turns:
        store = RendezvousStore(config.dataplane.interface_host)
        opening = asyncio.create_task(store.open(), name="rendezvous-store")
        stopping = asyncio.create_task(stop.wait(), name="balancer-stop")
        try:
            office = Office(
                config,
                server_id=server_id,
                telemetry=telemetry,
                turns=turns,
                store_address=store.address,
                gate=gate,
                ready=ready,
            )
            async with _page(config, office, gate):
                while not stop.is_set():
                    await office.take_turn(opening, stopping)
        finally:
            stopping.cancel()
            # The store's thread cannot be interrupted; what it opens must not outlive this call.
            await asyncio.gather(opening, stopping, return_exceptions=True)
            store.close()


@asynccontextmanager
async def _page(config: MeshConfig, office: Office, gate: Gate) -> AsyncIterator[None]:
    """The page, where one is wanted: only then the web server is imported."""
    if config.balancer.page_port is None:
        yield
        return
    from expertmesh.balancer.page.server import open_page

    async with open_page(config, office.admin, gate) as office.page:
        yield


class Office:
    """Where this balancer is found: its port is the same from turn to turn.

    Raises:
        UserError: the placement file cannot be used.
    """

    def __init__(
        self,
        config: MeshConfig,
        *,
        server_id: str,
        telemetry: Telemetry,
        turns: Turns,
        store_address: str,
        gate: Gate,
        ready: Callable[[str], None],
    ) -> None:
        config.check_doors()
        self._config = config
        self._server_id = server_id
        self._telemetry = telemetry
        self._turns = turns
        self._store_address = store_address
        self._gate = gate
        self._ready = ready
        self._told = False
        self._leading: Leading | None = None
        self.page = ""
        """Its URL, if there is one."""
        self._leader_gauge = telemetry.metrics.balancer_leader.labels()
        self._port = config.balancer.port
        self._initial = _initial_placement(config)

    def admin(self) -> AdminServicer:
        """What answers administrators now.

        Raises:
            NotLeadingError: another balancer does.
        """
        if self._leading is None:
            reason, leader = self._turns.refusal()
            raise NotLeadingError(f"{reason} (leader: {leader})" if leader else reason)
        return self._leading.admin

    async def take_turn(self, opening: asyncio.Task[None], stopping: asyncio.Task[bool]) -> None:
        """Listen, wait for a turn, lead until it is over or ``stopping`` ends.

        Args:
            opening: a part of the process; its end means nothing, its failure ends everything.

        Raises:
            UserError: as ``serve``.
        """
        board = Switchboard(_SERVICES, self._turns.refusal)
        server = await self._listen(board)
        try:
            if self._turns.shared:
                self._tell_ready(server.address)
            turn = await self._wait(server.address, opening, stopping)
            if turn is None:
                return
            async with _kept(turn) as keeping:
                leading = await self._begin(turn)
                if leading is None:
                    return
                try:
                    leading.answer_calls(board)
                    self._leading = leading
                    server.set_serving(True)
                    self._leader_gauge.set(1)
                    self._tell_ready(server.address)
                    await self._lead(turn, leading, opening, stopping, keeping)
                finally:
                    self._leading = None
                    self._leader_gauge.set(0)
                    leading.hang_up()
                    await server.stop(_STOP_GRACE_S)
                    await leading.close()
        finally:
            await server.stop(0.0)  # nothing is left of one that led

    async def _listen(self, board: Switchboard) -> rpc.RpcServer:
        def register(server: grpc.aio.Server) -> Sequence[str]:
            server.add_generic_rpc_handlers((board,))
            return _SERVICES

        deadline_s = time.monotonic() + _REBIND_TIMEOUT_S
        while True:
            try:
                server = await rpc.start_server(
                    host=self._config.balancer.host,
                    port=self._port,
                    tls=self._config.tls,
                    register=register,
                    telemetry=self._telemetry,
                    key="balancer.port",
                    gate=self._gate,
                )
            except UserError:
                if not self._told or time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(_REBIND_PAUSE_S)  # between two turns somebody's connection may have got our port
            else:
                self._port = int(server.address.rpartition(":")[2])
                return server

    def _tell_ready(self, address: str) -> None:
        """Once in the life of the process."""
        if not self._told:
            self._told = True
            self._ready(address)

    async def _wait(self, address: str, opening: asyncio.Task[None], stopping: asyncio.Task[bool]) -> Turn | None:
        """The next turn; None when the process stops before it."""
        if self._turns.shared and not opening.done():
            # It imports torch, which keeps the interpreter from all else for longer than a lease may take.
            await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        waiting = asyncio.create_task(self._turns.next(address), name="turn")
        try:
            await _first_of(opening, waiting, stopping)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _begin(self, turn: Turn) -> Leading | None:
        """Go on from what is saved; None when that cannot be read now."""
        try:
            known = await turn.state.load()
        except OSError as error:
            log.warning("%s: the state cannot be read: %s", turn.name, error)
            await asyncio.sleep(_UNREADABLE_PAUSE_S)
            return None
        state = known or fresh_state()
        leading = Leading(
            self._config,
            turn,
            state,
            store_address=self._store_address,
            initial=self._initial,
            telemetry=self._telemetry,
            page=self.page,
        )
        last = f"with the state of view {state.view.number}" if known else "without earlier state"
        kind, how = ("balancer_leads", f"{turn.name}: ") if self._turns.shared else ("balancer_started", "")
        leading.events.add(kind, self._server_id, f"{how}mesh {state.mesh_id} {last}")
        return leading

    async def _lead(
        self,
        turn: Turn,
        leading: Leading,
        opening: asyncio.Task[None],
        stopping: asyncio.Task[bool],
        keeping: asyncio.Task[str],
    ) -> None:
        """Until the turn is over, or ``stopping`` ends, or a part fails: then its error rises."""
        tasks = leading.tasks()
        try:
            await _first_of(opening, stopping, keeping, *tasks)
            for task in tasks:
                if task.done():
                    task.result()
            if keeping.done():
                log.warning("%s of %s is over: %s", turn.name, self._server_id, keeping.result())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _kept(turn: Turn) -> AsyncIterator[asyncio.Task[str]]:
    """Keeps a turn from its first moment to the last; yields the task, which ends when the turn is over before."""
    keeping = asyncio.create_task(turn.keep(), name="turn-keeper")
    try:
        yield keeping
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await turn.resign()


async def _first_of(opening: asyncio.Task[None], *tasks: asyncio.Task[Any]) -> None:
    """Until one of ``tasks`` ends, or ``opening`` fails: then its error rises."""
    done, _ = await asyncio.wait({opening, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    if opening in done:
        opening.result()
    if done == {opening}:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _initial_placement(config: MeshConfig) -> PlacementFile | None:
    """
    Raises:
        UserError: mode offline without a placement file, or with one that cannot be used.
    """
    path = config.balancer.placement_file
    if config.balancer.mode != "offline":
        return None
    if path is None:
        raise UserError(
            "balancer.placement_file", "is unset, and mode offline starts from it", "name a file, or use mode static"
        )
    return read_placement_file(path)
