"""``KeyValues`` in memory, with a clock that a test moves, and faults that it chooses."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from expertmesh.balancer.keyvalue import Entry, Guard, Lease, UnreachableError

_TURNS = 50
"""Of the event loop, after which everybody waits for something that only the clock brings."""


class FakeTime:
    """Seconds that only ``advance`` lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._numbers = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._numbers), future))
        await future

    async def advance(self, seconds: float, check: Callable[[], None] = lambda: None) -> None:
        """Wake who sleeps, in order. ``check`` is called whenever everybody waits."""
        end_s = self.now + seconds
        while True:
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            check()
            if not self._sleepers or self._sleepers[0][0] > end_s:
                break
            wake_s, _, future = heapq.heappop(self._sleepers)
            self.now = max(self.now, wake_s)
            if not future.done():
                future.set_result(None)
        self.now = end_s
        check()


@dataclass
class MemoryKv:
    """
    Attributes:
        down: nobody can be reached.
        lose_answers: that many transactions are done, and their callers hear nothing.
        fail_after: transactions that are still done; None = all.
        requests: bytes of each transaction.
    """

    time: FakeTime = field(default_factory=FakeTime)
    down: bool = False
    lose_answers: int = 0
    fail_after: int | None = None
    requests: list[int] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    _revision: int = 1
    _leases: dict[int, tuple[float, float]] = field(default_factory=dict)  # id → seconds, end

    async def get(self, key: str) -> Entry | None:
        self._answer()
        return self.entries.get(key)

    async def list_keys(self, prefix: str) -> list[str]:
        self._answer()
        return sorted(key for key in self.entries if key.startswith(prefix))

    async def transact(
        self, guard: Guard, *, puts: Mapping[str, bytes] | None = None, deletes: Sequence[str] = (), lease: int = 0
    ) -> bool:
        self._answer()
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise UnreachableError("the store went away")
            self.fail_after -= 1
        found = self.entries.get(guard.key)
        holds = (found.create_revision if found is not None else 0) == guard.create_revision
        if holds:
            self._revision += 1
            self._write(puts or {}, deletes, lease)
        if self.lose_answers:
            self.lose_answers -= 1
            raise UnreachableError("the answer was lost")
        return holds

    def _write(self, puts: Mapping[str, bytes], deletes: Sequence[str], lease: int) -> None:
        self.requests.append(sum(len(key) + len(value) for key, value in puts.items()))
        gone = [key for key in self.entries if any(key.startswith(d) if d.endswith("/") else key == d for d in deletes)]
        assert not set(gone) & puts.keys(), "etcd refuses to write a key twice in a transaction"
        for key in gone:
            del self.entries[key]
        for key, value in puts.items():
            old = self.entries.get(key)
            created = old.create_revision if old is not None else self._revision
            self.entries[key] = Entry(value=value, create_revision=created, mod_revision=self._revision, lease=lease)

    async def grant(self, ttl_s: int) -> Lease:
        self._answer()
        number = len(self._leases) + 1
        self._leases[number] = (float(ttl_s), self.time.now + ttl_s)
        return Lease(id=number, ttl_s=float(ttl_s))

    async def renew(self, lease: int) -> float:
        self._answer()
        ttl_s, end_s = self._leases[lease]
        if end_s <= self.time.now:
            return 0.0
        self._leases[lease] = (ttl_s, self.time.now + ttl_s)
        return ttl_s

    async def revoke(self, lease: int) -> None:
        self._answer()
        self._leases[lease] = (0.0, self.time.now)
        self._expire()

    async def wait_deleted(self, key: str, after: int, timeout_s: float) -> None:
        end_s = self.time.now + timeout_s
        while not self.down and self.time.now < end_s:
            self._expire()
            found = self.entries.get(key)
            if found is None or found.mod_revision > after:
                return
            await self.time.sleep(0.05)

    def _answer(self) -> None:
        if self.down:
            raise UnreachableError("the store is down")
        self._expire()

    def _expire(self) -> None:
        over = {lease for lease, (_, end_s) in self._leases.items() if end_s <= self.time.now}
        for key in [key for key, entry in self.entries.items() if entry.lease in over]:
            self._revision += 1
            del self.entries[key]
