"""A NIXL agent over UCX: the memory of a KV cache that peers read from, and reads of theirs.

Reads rather than writes: who asks for blocks gives nobody a key to its memory, and fills its own blocks only.

NIXL's calls do not wait, and nothing happens between them; all of them are made by one thread, which sleeps while
nothing is under way. NIXL's own thread for this never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_transport import HandoverError
from expertmesh.attention_server.nixl_setup import load_nixl, ucx_settings
from expertmesh.mesh.errors import UserError

_POLL_S = 0.0005
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0
_MAX_PEERS = 64


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where blocks are in an agent's memory: ``pieces_P3`` uint64 [P, 3], address, bytes and device of each piece."""

    pieces_P3: np.ndarray
    on_host: bool

    @property
    def kind(self) -> str:
        return "DRAM" if self.on_host else "VRAM"


@dataclass(eq=False)
class _Peer:
    """``is_lost``: it takes no more, and is forgotten with its last read; then what failed before is ``over`` too."""

    name: str
    reads: set[_Read] = field(default_factory=set)
    is_lost: bool = False
    over: list[Callable[[], None]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class _Read:
    metadata: bytes
    theirs: Span
    ours: Span
    may_begin: Callable[[], bool]
    over: Callable[[], None]
    future: Future[None] = field(default_factory=Future)
    is_abandoned: bool = False
    handle: Any = None
    peer: _Peer | None = None


class NixlAgent:
    """Registers the memory once and for all. ``close`` it at the end, when nobody reads any more.

    Args:
        host: address of the interface to be reached at.

    Raises:
        UserError: NIXL is not installed, or cannot use the memory.
    """

    def __init__(self, memory: BlockMemory, host: str) -> None:
        self._nixl = load_nixl()
        self._memory = memory
        self._errors: tuple[type[Exception], ...] = tuple(
            kind
            for kind in vars(self._nixl._bindings).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        self._jobs: queue.SimpleQueue[_Read | Callable[[], None] | None] = queue.SimpleQueue()
        self._reads: set[_Read] = set()
        self._peers: dict[bytes, _Peer] = {}  # by metadata, the least recently met first
        self._num_lent = 0
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
                "disaggregation.transport",
                f"NIXL cannot use the KV cache on {memory.device}: {error or type(error).__name__}",
                "look at what UCX says above (UCX_TLS and UCX_NET_DEVICES in the environment decide what it uses)",
            ) from None

    def close(self) -> None:
        """Reads that are under way fail; peers' reads too."""
        self._jobs.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Peers may be reading: without RDMA they need this side to answer."""
        self._jobs.put(partial(self._lend, 1))
        try:
            yield
        finally:
            self._jobs.put(partial(self._lend, -1))

    async def read(
        self, metadata: bytes, theirs: Span, ours: Span, *, may_begin: Callable[[], bool], over: Callable[[], None]
    ) -> None:
        """Copy a peer's pieces into ours, one to one.

        Args:
            metadata: the peer's, from one who may be trusted: NIXL does not expect to be lied to.
            may_begin: asked until it says yes.
            over: called in another thread, when it is certain that nothing is written to ``ours`` any more; that may
                be long after a cancellation, as long as a peer neither answers nor is gone.

        Raises:
            HandoverError: the peer is gone, or has not registered what is to be read, or owes earlier reads that were
                given up: it is asked for nothing more until they are over.
        """
        read = _Read(metadata=metadata, theirs=theirs, ours=ours, may_begin=may_begin, over=over)
        if not self._thread.is_alive():
            over()
            raise HandoverError("the NIXL agent has stopped")
        self._jobs.put(read)
        try:
            await asyncio.wrap_future(read.future)  # whoever calls bounds the time
        except asyncio.CancelledError:
            read.is_abandoned = True
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
        finally:
            for read in [*self._reads, *self._left()]:
                if read.handle is None:  # of others nobody can say any more what becomes of their memory
                    read.over()
                _answer(read, HandoverError("the NIXL agent has stopped"))

    def _open(self, host: str) -> Any:
        if self._memory.device.type == "cuda":
            torch.cuda.set_device(self._memory.device)
        config = self._nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
        agent = self._nixl.nixl_agent(f"kv-{secrets.token_hex(16)}", config)
        agent.create_backend("UCX", {"engine_config": ucx_settings(host, self._memory), "ucx_ep_close_force": "true"})
        device = self._memory.device.index or 0
        regions = [(start, size, device, "") for start, size in self._memory.regions()]
        agent.register_memory(regions, "DRAM" if self._memory.is_on_host else "VRAM")
        self.metadata = agent.get_agent_metadata()
        return agent

    def _serve(self, agent: Any) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_POLL_S if self._reads or self._num_lent else None)
            except queue.Empty:
                pass
            else:
                if job is None:
                    return
                if isinstance(job, _Read):
                    self._reads.add(job)
                else:
                    job()
            for read in list(self._reads):
                self._advance(agent, read)
            if self._num_lent:
                with contextlib.suppress(*self._errors):
                    agent.get_new_notifs()  # there are none: it lets UCX work

    def _lend(self, count: int) -> None:
        self._num_lent += count

    def _left(self) -> Iterator[_Read]:
        while not self._jobs.empty():
            job = self._jobs.get()
            if isinstance(job, _Read):
                yield job

    def _advance(self, agent: Any, read: _Read) -> None:
        try:
            if read.handle is None:
                if read.is_abandoned:
                    self._end(agent, read, HandoverError("it was given up"))
                elif read.may_begin():
                    self._begin(agent, read)
                return
            state = agent.check_xfer_state(read.handle)
        except Exception as error:  # noqa: BLE001 - whatever it is, of this read alone; its owner says it
            if read.peer is not None:
                read.peer.is_lost = True
            self._end(agent, read, HandoverError(f"NIXL: {type(error).__name__}: {error}"))
            return
        if state == "DONE":
            self._end(agent, read, None)

    def _begin(self, agent: Any, read: _Read) -> None:
        peer = self._meet(agent, read.metadata)
        ours = agent.get_xfer_descs(read.ours.pieces_P3, read.ours.kind)
        theirs = agent.get_xfer_descs(read.theirs.pieces_P3, read.theirs.kind)
        # It refuses what lies outside of the memory that the peer's metadata names, or outside of our own.
        read.handle = agent.initialize_xfer("READ", ours, theirs, peer.name)
        read.peer = peer
        peer.reads.add(read)
        agent.transfer(read.handle)

    def _meet(self, agent: Any, metadata: bytes) -> _Peer:
        peer = self._peers.pop(metadata, None)
        if peer is None:
            for stranger in list(self._peers):
                if len(self._peers) >= _MAX_PEERS and not self._peers[stranger].reads:
                    self._forget(agent, stranger)
            peer = _Peer(agent.add_remote_agent(metadata).decode())
        self._peers[metadata] = peer
        if peer.is_lost or any(read.is_abandoned for read in peer.reads):
            raise HandoverError("the peer owes earlier blocks")
        return peer

    def _forget(self, agent: Any, metadata: bytes) -> None:
        """Its connection is closed, by force."""
        peer = self._peers.pop(metadata)
        with contextlib.suppress(*self._errors):  # NIXL forgets one that has hung up by itself
            agent.remove_remote_agent(peer.name)

    def _end(self, agent: Any, read: _Read, error: HandoverError | None) -> None:
        self._reads.discard(read)
        peer, over = read.peer, [read.over]
        if peer is not None:
            with contextlib.suppress(*self._errors):
                read.handle.release()
            peer.reads.discard(read)
            if peer.is_lost:
                peer.over += over
                over = []
                if not peer.reads:
                    self._forget(agent, read.metadata)
                    over = peer.over
        for tell in over:
            tell()
        _answer(read, error)


def _answer(read: _Read, error: HandoverError | None) -> None:
    if read.future.set_running_or_notify_cancel():
        if error is None:
            read.future.set_result(None)
        else:
            read.future.set_exception(error)
