"""When this balancer leads, and what it knows then: from its start to its end on a folder of its own, or by turns with
others that share etcd."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from expertmesh.balancer import etcd
from expertmesh.balancer.election import Election, Term
from expertmesh.balancer.keyvalue import KeyValues
from expertmesh.balancer.saver import RETRY_S, FileState, StateKeeper
from expertmesh.balancer.state import StateFile
from expertmesh.balancer.state_etcd import EtcdState
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.rpc import join_host_port

_ETCD_RETRY_S = 0.5
_RESIGN_TIMEOUT_S = 2.0
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 - compared with, not bound to


class Turn(Protocol):
    """A time in which this balancer leads.

    Attributes:
        name: for people.
        state: what its predecessor left, and where its own is saved.
        save_retry_s: after a save that failed.
        saves_first: others may follow at any moment, so that they must find what was said.
    """

    name: str
    state: StateKeeper
    save_retry_s: float
    saves_first: bool

    def holds(self) -> bool:
        """Whether nobody else can lead now."""
        ...

    async def keep(self) -> str:
        """Until it is over; returns why."""
        ...

    async def resign(self) -> None: ...


class Turns(Protocol):
    """``shared``: another balancer may lead, so that this one may have to wait for its turn."""

    shared: bool

    async def next(self, address: str) -> Turn:
        """Wait for it. ``address`` is where this balancer is found."""
        ...

    def refusal(self) -> tuple[str, str]:
        """What calls are told between two turns, and the leader's address, '' when that is unknown."""
        ...


@asynccontextmanager
async def open_turns(config: MeshConfig, server_id: str) -> AsyncIterator[Turns]:
    """
    Raises:
        UserError: the state folder cannot be used, or etcd refuses its user.
    """
    if config.balancer.state == "etcd":
        prefix = f"{config.balancer.etcd.prefix}/{config.name}/balancer"
        async with etcd.connected(config.balancer.etcd) as client:
            await client.check(prefix)
            yield SharedTurns(client, prefix, server_id, config.balancer.etcd.lease_s)
        return
    file = StateFile(config.balancer.state_dir or Path(".expertmesh") / config.name)
    try:
        yield OnlyTurn(file)
    finally:
        file.close()


class OnlyTurn:
    """Both the turns and the turn of a balancer that shares its mesh with no other."""

    shared = False
    saves_first = False  # a mesh goes on even with a full disk: its ranks bring what was not saved
    save_retry_s = RETRY_S
    name = "alone"

    def __init__(self, file: StateFile) -> None:
        self.state: StateKeeper = FileState(file)

    async def next(self, address: str) -> Turn:
        return self

    def refusal(self) -> tuple[str, str]:
        return "the balancer is about to start", ""

    def holds(self) -> bool:
        return True

    async def keep(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError("cancelled before")

    async def resign(self) -> None:
        pass


class SharedTurns:
    """Turns by election.

    Args:
        prefix: of the mesh's keys, without a slash at its end.
    """

    shared = True

    def __init__(self, kv: KeyValues, prefix: str, server_id: str, lease_s: int) -> None:
        self._kv = kv
        self._prefix = prefix
        self._server_id = server_id
        self._lease_s = lease_s
        self._election: Election | None = None

    async def next(self, address: str) -> Turn:
        if self._election is None:
            self._election = Election(
                self._kv,
                key=f"{self._prefix}/leader",
                server_id=self._server_id,
                address=seen_from_afar(address),
                lease_s=self._lease_s,
            )
        return SharedTurn(self._kv, self._prefix, await self._election.win())

    def refusal(self) -> tuple[str, str]:
        leader = self._election.leader if self._election is not None else None
        if leader is None or leader.server_id == self._server_id:
            return f"{self._server_id} stands by: no leader is known", ""
        return f"{self._server_id} stands by: {leader.server_id} at {leader.address} leads", leader.address


class SharedTurn:
    """One term."""

    saves_first = True
    save_retry_s = _ETCD_RETRY_S

    def __init__(self, kv: KeyValues, prefix: str, term: Term) -> None:
        self.name = f"term {term.number}"
        self.state: StateKeeper = EtcdState(kv, prefix, term)
        self._term = term
        self.holds = term.holds
        self.keep = term.keep

    async def resign(self) -> None:
        with contextlib.suppress(TimeoutError):  # then the lease runs out by itself
            async with asyncio.timeout(_RESIGN_TIMEOUT_S):
                await self._term.resign()


def seen_from_afar(address: str) -> str:
    """A balancer that listens everywhere is found under its machine's name."""
    host, _, port = address.rpartition(":")
    return join_host_port(socket.gethostname(), int(port)) if host in _WILDCARDS else address
