"""A NIXL agent over UCX: memory that peers read from, and reads of theirs.

Reads rather than writes: who asks gives nobody a key to its memory, and fills what it has set aside for it only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from functools import partial

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.nixl_reads import Memory, Reading, Span
from expertmesh.mesh.nixl_setup import Purpose, load_nixl
from expertmesh.mesh.nixl_worker import Job, NixlWorker, end_unbegun

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0


class NixlAgent:
    """Registers the memory once and for all. ``close`` it at the end, when nobody reads any more; one that nobody has
    any more ends by itself.

    Args:
        host: address of the interface to be reached at.

    Raises:
        UserError: NIXL is not installed, or cannot use the memory.
    """

    def __init__(self, memory: Memory, host: str, purpose: Purpose) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._worker = NixlWorker(load_nixl(purpose), memory, self._jobs, weakref.ref(self))
        started: Future[bytes] = Future()
        self._thread = threading.Thread(target=self._worker.run, args=(host, started), name="nixl", daemon=True)
        self._thread.start()
        failures: tuple[type[Exception], ...] = (*self._worker.errors, RuntimeError, OSError, TimeoutError)
        try:
            self.metadata = started.result(_START_TIMEOUT_S)
            """What a peer needs to read from here."""
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
        self._jobs.put(partial(self._worker.lent.__setitem__, borrower, until_s))

    def take_back(self, borrower: Hashable) -> None:
        self._jobs.put(partial(self._worker.lent.pop, borrower, None))

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
            end_unbegun(reading)
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
