"""The thread of a NIXL agent.

NIXL's calls do not wait, and nothing happens between them; all of them are made by one thread, which sleeps while
nothing is under way. NIXL's own thread for this never sleeps.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from typing import Any, TypeAlias

import torch

from expertmesh.mesh.nixl_reads import Memory, NixlError, Peer, Reading
from expertmesh.mesh.nixl_setup import ucx_settings

Job: TypeAlias = Reading | Callable[[], object] | None
"""A read to begin, something to do in the thread, or None: the end."""

_POLL_S = 0.0005
_IDLE_S = 1.0
"""How often it looks, with nothing under way, whether anybody still has the agent."""
_LAST_READS_S = 1.0
"""Reads that are under way at the end may take so long before their connections are closed."""
_MAX_PEERS = 64


class NixlWorker:
    """What a ``NixlAgent`` has its thread do: ``run``. The rest is for that thread alone, ``lent`` by way of jobs.

    Args:
        nixl: the module.
        owner: of the agent; when that has gone without a word, the thread ends.
    """

    def __init__(
        self, nixl: Any, memory: Memory, jobs: queue.SimpleQueue[Job], owner: weakref.ReferenceType[object]
    ) -> None:
        self._nixl = nixl
        self._memory = memory
        self._jobs = jobs
        self._owner = owner
        self.errors: tuple[type[Exception], ...] = tuple(
            kind for kind in vars(nixl._bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)
        )
        self.reads: set[Reading] = set()
        self.lent: dict[Hashable, float] = {}  # until when, monotonic
        self._peers: dict[bytes, Peer] = {}  # by metadata, the least recently met first

    def run(self, host: str, started: Future[bytes]) -> None:
        """Until the agent is closed. ``started``: what peers need to read from here, or why they cannot."""
        try:
            agent = self._open(host)
            metadata = agent.get_agent_metadata()
        except Exception as error:  # noqa: BLE001 - told to who waits for the start
            started.set_exception(error)
            return
        started.set_result(metadata)
        try:
            self._serve(agent)
            self._wind_up(agent)
        finally:
            for read in [*self.reads, *self._left()]:
                if read.handle is None:
                    end_unbegun(read)
                else:  # nobody can say any more what becomes of its memory
                    _answer(read, NixlError("the NIXL agent has stopped"))

    def _open(self, host: str) -> Any:
        if self._memory.device.type == "cuda":
            torch.cuda.set_device(self._memory.device)
        config = self._nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
        agent = self._nixl.nixl_agent(f"expertmesh-{secrets.token_hex(16)}", config)
        settings = ucx_settings(host, is_on_host=self._memory.is_on_host)
        agent.create_backend("UCX", {"engine_config": settings, "ucx_ep_close_force": "true"})
        device = self._memory.device.index or 0
        regions = [(start, size, device, "") for start, size in self._memory.regions()]
        agent.register_memory(regions, "DRAM" if self._memory.is_on_host else "VRAM")
        return agent

    def _serve(self, agent: Any) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_POLL_S if self.reads or self.lent else _IDLE_S)
            except queue.Empty:
                if self._owner() is None:
                    return
            else:
                if job is None:
                    return
                if isinstance(job, Reading):
                    self.reads.add(job)
                else:
                    job()
            self._work(agent)

    def _work(self, agent: Any) -> None:
        for read in list(self.reads):
            self._advance(agent, read)
        if self.lent:
            with contextlib.suppress(*self.errors):
                agent.get_new_notifs()  # there are none: it lets UCX work
            now = time.monotonic()
            for borrower in [borrower for borrower, until_s in self.lent.items() if until_s < now]:
                del self.lent[borrower]

    def _wind_up(self, agent: Any) -> None:
        """With the agent the memory's registration goes: nothing may be under way any more then."""
        for read in self.reads:
            read.abandon()
        deadline_s = time.monotonic() + _LAST_READS_S
        while self.reads and time.monotonic() < deadline_s:
            self._work(agent)
            time.sleep(_POLL_S)
        for read in list(self.reads):
            self._end(agent, read, NixlError("the NIXL agent has stopped"), is_lost=True)

    def _left(self) -> Iterator[Reading]:
        while not self._jobs.empty():
            job = self._jobs.get()
            if isinstance(job, Reading):
                yield job

    def _advance(self, agent: Any, read: Reading) -> None:
        try:
            if read.handle is None:
                if read.is_abandoned:
                    self._end(agent, read, NixlError("it was given up"))
                elif read.may_begin():
                    self._begin(agent, read)
                return
            state = agent.check_xfer_state(read.handle)
        except Exception as error:  # noqa: BLE001 - whatever it is, of this read alone; its owner says it
            self._end(agent, read, NixlError(f"NIXL: {type(error).__name__}: {error}"), is_lost=True)
            return
        if state == "DONE":
            read.seconds = time.monotonic() - read.began_s
            self._end(agent, read, None)

    def _begin(self, agent: Any, read: Reading) -> None:
        peer = self._meet(agent, read.metadata)
        ours = agent.get_xfer_descs(read.ours.pieces_P3, read.ours.kind)
        theirs = agent.get_xfer_descs(read.theirs.pieces_P3, read.theirs.kind)
        # It refuses what lies outside of the memory that the peer's metadata names, or outside of our own.
        read.handle = agent.initialize_xfer("READ", ours, theirs, peer.name)
        read.peer = peer
        peer.reads.add(read)
        read.began_s = time.monotonic()
        agent.transfer(read.handle)

    def _meet(self, agent: Any, metadata: bytes) -> Peer:
        peer = self._peers.pop(metadata, None)
        if peer is None:
            for stranger in list(self._peers):
                if len(self._peers) >= _MAX_PEERS and not self._peers[stranger].reads:
                    self._forget(agent, stranger)
            peer = Peer(agent.add_remote_agent(metadata).decode())
        self._peers[metadata] = peer
        if peer.is_lost or any(read.is_abandoned for read in peer.reads):
            raise NixlError("the peer owes earlier reads")
        return peer

    def _forget(self, agent: Any, metadata: bytes) -> None:
        """Its connection is closed, by force."""
        peer = self._peers.pop(metadata)
        with contextlib.suppress(*self.errors):  # NIXL forgets one that has hung up by itself
            agent.remove_remote_agent(peer.name)

    def _end(self, agent: Any, read: Reading, error: NixlError | None, *, is_lost: bool = False) -> None:
        """``is_lost``: and so is its peer."""
        self.reads.discard(read)
        peer, over = read.peer, [read.over]
        if peer is not None:
            peer.is_lost = peer.is_lost or is_lost
            with contextlib.suppress(*self.errors):
                read.handle.release()
            peer.reads.discard(read)
            if peer.is_lost:
                peer.over += over
                over = []
                if not peer.reads:
                    self._forget(agent, read.metadata)
                    over = peer.over
        for future in over:
            future.set_result(None)
        _answer(read, error)


def end_unbegun(read: Reading) -> None:
    """Of an agent that has ended."""
    read.over.set_result(None)
    _answer(read, NixlError("the NIXL agent has stopped"))


def _answer(read: Reading, error: NixlError | None) -> None:
    if read.result.set_running_or_notify_cancel():
        if error is None:
            read.result.set_result(None)
        else:
            read.result.set_exception(error)
