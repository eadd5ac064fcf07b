"""Saves the newest state beside the reconcile loop, and holds messages back until what they follow from is saved."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from expertmesh.balancer.events import EventLog
from expertmesh.balancer.keyvalue import DeposedError
from expertmesh.balancer.state import DurableState, StateFile
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

RETRY_S = 5.0


class StateKeeper(Protocol):
    """Where the state is between two lives of a balancer."""

    async def load(self) -> DurableState | None:
        """None when nothing was ever saved.

        Raises:
            OSError: it cannot be read now.
            UserError: what is there is not whole.
        """
        ...

    async def save(self, state: DurableState) -> None:
        """Replace it as a whole.

        Raises:
            OSError: it cannot be written now; what was saved before is untouched.
            DeposedError: it is another balancer's by now.
        """
        ...


class FileState:
    """``StateKeeper`` over a file, on a thread: a slow or full disk holds up nothing else."""

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self._writing = threading.Lock()  # a save that was cancelled goes on in its thread

    async def load(self) -> DurableState | None:
        return await asyncio.to_thread(self._file.load)

    async def save(self, state: DurableState) -> None:
        await asyncio.to_thread(self._save, state)

    def _save(self, state: DurableState) -> None:
        with self._writing:
            self._file.save(state)


class StateSaver:
    """Writes the newest state that was asked for; while that fails, again every ``retry_s``."""

    def __init__(self, keeper: StateKeeper, events: EventLog, retry_s: float = RETRY_S) -> None:
        self._keeper = keeper
        self._events = events
        self._retry_s = retry_s
        self._newest: DurableState | None = None
        self._asked = asyncio.Event()
        self._failed = False
        self.num_asked = 0
        self.num_saved = 0
        """Every state up to this one is saved, or a newer one is."""
        self.on_saved: Callable[[], None] = lambda: None

    def ask(self, state: DurableState) -> None:
        self._newest = state
        self.num_asked += 1
        self._asked.set()

    async def run(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            if not await self.flush():
                await asyncio.sleep(self._retry_s)
                self._asked.set()

    async def flush(self) -> bool:
        """Write what was asked for last; False when that failed."""
        state, number = self._newest, self.num_asked
        if state is None:
            return True
        try:
            await self._keeper.save(state)
        except DeposedError as error:
            log.warning("the state was not saved: %s", error)
            return False
        except OSError as error:
            if not self._failed:
                text = f"the state cannot be saved ({error}); serving goes on, and saving is tried again"
                self._events.add("state_not_saved", "balancer", text, logging.ERROR)
            self._failed = True
            return False
        if self._failed:
            self._events.add("state_saved", "balancer", "the state can be saved again")
        self._failed = False
        self.num_saved = number
        self.on_saved()
        return True


class Outgoing(Protocol):
    """What the balancer says on its streams."""

    def send(self, session: int, message: mesh_pb2.JoinResponse) -> None: ...

    def close(self, session: int) -> None: ...


class SavedFirst:
    """``Outgoing`` of a leader that others may follow at any moment: what it says, its successor will know.

    A view goes to servers only when it is saved, or the next leader might give another one the same number. Nothing
    goes out when the term no longer holds. Order is kept over all streams. A Welcome follows from nothing: it is the
    first on its stream, and a server that waited for it while nothing can be saved would call again and again.
    """

    def __init__(self, inner: Outgoing, saver: StateSaver, holds: Callable[[], bool]) -> None:
        self._inner = inner
        self._saver = saver
        self._holds = holds
        self._held: deque[tuple[int, Callable[[], None]]] = deque()  # with the state that has to be saved first
        saver.on_saved = self._release

    def send(self, session: int, message: mesh_pb2.JoinResponse) -> None:
        if message.WhichOneof("message") == "welcome":
            if self._holds():
                self._inner.send(session, message)
            return
        self._put(lambda: self._inner.send(session, message))

    def close(self, session: int) -> None:
        self._put(lambda: self._inner.close(session))

    def _put(self, act: Callable[[], None]) -> None:
        self._held.append((self._saver.num_asked, act))
        self._release()

    def _release(self) -> None:
        while self._held and self._held[0][0] <= self._saver.num_saved:
            _, act = self._held.popleft()
            if self._holds():
                act()
