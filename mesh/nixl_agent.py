"""A NIXL agent over UCX: memory that peers read from, and reads of theirs.

Reads rather than writes: who asks gives nobody a key to its memory, and fills what it has set aside for it only.

NIXL's calls do not wait, and nothing happens between them; all of them are made by one thread, which sleeps while
nothing is under way. NIXL's own thread for this never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.nixl_reads import Memory, NixlError, Peer, Reading, Span
from expertmesh.mesh.nixl_setup import Purpose, load_nixl, ucx_settings

_POLL_S = 0.0005
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0
_LAST_READS_S = 1.0
"""Reads that are under way at the end may take so long before their connections are closed."""
_MAX_PEERS = 64


class NixlAgent:
    """Registers the memory once and for all. ``close`` it at the end, when nobody reads any more.

    Args:
        host: address of the interface to be reached at.

    Raises:
        UserError: NIXL is not installed, or cannot use the memory.
    """

    def __init__(self, memory: Memory, host: str, purpose: Purpose) -> None:
        self._nixl = load_nixl(purpose)
        self._memory = memory
        self._errors: tuple[type[Exception], ...] = tuple(
            kind
            for kind in vars(self._nixl._bindings).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        self._jobs: queue.SimpleQueue[Reading | Callable[[], object] | None] = queue.SimpleQueue()
        self._reads: set[Reading] = set()
        self._peers: dict[bytes, Peer] = {}  # by metadata, the least recently met first
        self._lent: dict[Hashable, float] = {}  # until when, monotonic
        self.metadata = b""
        """What a peer needs to read from here."""
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(host, started), name="nixl", daemon=True)
        self._thread.start()
        failures: tuple[type[Exception], ...] = (*self._errors, RuntimeError, OSError, TimeoutError)
        try:
            started.result(_START_TIMEOUT_S)
        except failures as error:
            raise UserError(
                purpose.key,
                f"NIXL cannot use {purpose.where} on {memory.device}: {error or type(error).__name__}",
                "look at what UCX says above (UCX_TLS and UCX_NET_DEVICES in the environment decide what it uses)",
            ) from None

    def close(self) -> None:
        """Reads that are under way fail; peers' reads too."""
        self._jobs.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Peers may be reading: without RDMA they need this side to answer."""
        borrower = object()
        self.lend(borrower)
        try:
            yield
        finally:
            self.take_back(borrower)

    def lend(self, borrower: Hashable, until_s: float = math.inf) -> None:
        """As ``lending``, until it is taken back or until a monotonic time."""
        self._jobs.put(partial(self._lent.__setitem__, borrower, until_s))

    def take_back(self, borrower: Hashable) -> None:
        self._jobs.put(partial(self._lent.pop, borrower, None))

    def start(self, metadata: bytes, theirs: Span, ours: Span, may_begin: Callable[[], bool]) -> Reading:
        """Copy a peer's pieces into ours, one to one. Whoever calls bounds the time.

        It fails when the peer is gone, or has not registered what is to be read, or owes earlier reads that were given
        up: it is asked for nothing more until they are over.

        Args:
            metadata: the peer's, from one who may be trusted: NIXL does not expect to be lied to.
            may_begin: asked, in the agent's thread, until it says yes.
        """
        reading = Reading(metadata=metadata, theirs=theirs, ours=ours, may_begin=may_begin)
        if self._thread.is_alive():
            self._jobs.put(reading)
        else:
            _end_unbegun(reading)
        return reading

    async def read(
        self, metadata: bytes, theirs: Span, ours: Span, *, may_begin: Callable[[], bool], over: Callable[[], None]
    ) -> None:
        """As ``start``, and wait for it; ``over`` is called when ``Reading.over`` is set, in the agent's thread.

        Raises:
            NixlError: it failed.
        """
        reading = self.start(metadata, theirs, ours, may_begin)
        reading.over.add_done_callback(lambda _: over())
        try:
            await asyncio.wrap_future(reading.result)  # whoever calls bounds the time
        except asyncio.CancelledError:
            reading.abandon()
            raise

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self, host: str, started: Future[None]) -> None:
        try:
            agent = self._open(host)
        except Exception as error:  # noqa: BLE001 - told to who waits for the start
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            self._serve(agent)
            self._wind_up(agent)
        finally:
            for read in [*self._reads, *self._left()]:
                if read.handle is None:
                    _end_unbegun(read)
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
        self.metadata = agent.get_agent_metadata()
        return agent

    def _serve(self, agent: Any) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_POLL_S if self._reads or self._lent else None)
            except queue.Empty:
                pass
            else:
                if job is None:
                    return
                if isinstance(job, Reading):
                    self._reads.add(job)
                else:
                    job()
            self._work(agent)

    def _work(self, agent: Any) -> None:
        for read in list(self._reads):
            self._advance(agent, read)
        if self._lent:
            with contextlib.suppress(*self._errors):
                agent.get_new_notifs()  # there are none: it lets UCX work
            now = time.monotonic()
            for borrower in [borrower for borrower, until_s in self._lent.items() if until_s < now]:
                del self._lent[borrower]

    def _wind_up(self, agent: Any) -> None:
        """With the agent the memory's registration goes: nothing may be under way any more then."""
        for read in self._reads:
            read.abandon()
        deadline_s = time.monotonic() + _LAST_READS_S
        while self._reads and time.monotonic() < deadline_s:
            self._work(agent)
            time.sleep(_POLL_S)
        for read in list(self._reads):
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
        with contextlib.suppress(*self._errors):  # NIXL forgets one that has hung up by itself
            agent.remove_remote_agent(peer.name)

    def _end(self, agent: Any, read: Reading, error: NixlError | None, *, is_lost: bool = False) -> None:
        """``is_lost``: and so is its peer."""
        self._reads.discard(read)
        peer, over = read.peer, [read.over]
        if peer is not None:
            peer.is_lost = peer.is_lost or is_lost
            with contextlib.suppress(*self._errors):
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


def _end_unbegun(read: Reading) -> None:
    read.over.set_result(None)
    _answer(read, NixlError("the NIXL agent has stopped"))


def _answer(read: Reading, error: NixlError | None) -> None:
    if read.result.set_running_or_notify_cancel():
        if error is None:
            read.result.set_result(None)
        else:
            read.result.set_exception(error)
