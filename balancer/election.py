"""Who leads: one key with a lease, made only while there is none.

A leader's *term* is that key's creation revision, which no other term ever has: every write compares it, so that a
leader that was stopped in the middle of something, and wakes up when another one leads, changes nothing. By the clock
it knows that its lease may be over before it asks anybody: from then on ``Term.holds`` is False.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from expertmesh.balancer.keyvalue import Guard, KeyValues, Lease

log = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 4
# Two clocks may differ in speed by far less than this share of a lease.
_CLOCK_MARGIN = 0.05
_RETRY_S = 0.2
_SILENCE_TOLD_S = 30.0


def lease_clock() -> float:
    """Seconds that go on while the machine sleeps, as those of the store do."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, kw_only=True, slots=True)
class Leader:
    """Whom the leader's key names. ``process`` is a balancer's from its start to its end."""

    server_id: str
    address: str
    process: str

    def encode(self) -> bytes:
        return json.dumps({"id": self.server_id, "address": self.address, "process": self.process}).encode()

    @classmethod
    def decode(cls, value: bytes) -> Leader:
        """Something else under the leader's key is a leader nobody knows."""
        try:
            fields = json.loads(value)
            return cls(server_id=fields["id"], address=fields["address"], process=fields["process"])
        except (ValueError, KeyError, TypeError):
            return cls(server_id="a stranger", address="", process="")


class Term:
    """The time for which this process leads."""

    def __init__(
        self,
        kv: KeyValues,
        *,
        guard: Guard,
        lease: Lease,
        granted_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.guard = guard
        """What every write of this term is conditional on."""
        self._kv = kv
        self._lease = lease
        self._clock = clock
        self._sleep = sleep
        self._until_s = 0.0
        self._over = ""
        self._renewed(granted_s, lease.ttl_s)

    @property
    def number(self) -> int:
        """Later terms have greater ones."""
        return self.guard.create_revision

    def holds(self) -> bool:
        """Whether nobody else can lead now. Asks no one."""
        return not self._over and self._clock() < self._until_s

    def end(self, reason: str) -> None:
        """``holds`` from now on says no; the first reason counts."""
        self._over = self._over or reason

    async def keep(self) -> str:
        """Renew the lease until the term is over; returns why."""
        problem = ""
        while self.holds():
            pause_s = _RETRY_S if problem else self._lease.ttl_s / _RENEWALS_PER_LEASE
            await self._sleep(max(0.0, min(pause_s, self._until_s - self._clock())))
            if not self.holds():  # this process stood still
                break
            asked_s = self._clock()
            try:
                async with asyncio.timeout(self._until_s - asked_s):
                    self._renewed(asked_s, await self._renew())
                problem = ""
            except TimeoutError:
                problem = problem or "no answer to its renewal"
            except OSError as error:
                if not problem:
                    log.warning("the lease could not be renewed, trying again until it ends: %s", error)
                problem = str(error)
        self.end(f"its lease of {self._lease.ttl_s:g} s ran out" + (f": {problem}" if problem else ""))
        return self._over

    async def _renew(self) -> float:
        ttl_s = await self._kv.renew(self._lease.id)
        if ttl_s <= 0:
            self.end("the store had ended its lease")
            return 0.0
        holder = await self._kv.get(self.guard.key)
        if holder is None or holder.create_revision != self.guard.create_revision:
            self.end("somebody took the leader's key away")
        return ttl_s

    def _renewed(self, asked_s: float, ttl_s: float) -> None:
        """The lease runs from when the store heard of it: no earlier than we asked."""
        self._until_s = max(self._until_s, asked_s + ttl_s * (1 - _CLOCK_MARGIN))

    async def resign(self) -> None:
        """End the lease now, so that the next leader need not wait for its end."""
        self.end("it resigned")
        with contextlib.suppress(OSError):  # then it runs out by itself
            await self._kv.revoke(self._lease.id)


class Election:
    """One balancer's part in it.

    Args:
        key: the leader's.
        address: where this balancer is reached, for those who ask another one.
        clock: like ``lease_clock``; of ``Term`` as well.
    """

    def __init__(
        self,
        kv: KeyValues,
        *,
        key: str,
        server_id: str,
        address: str,
        lease_s: int,
        clock: Callable[[], float] = lease_clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kv = kv
        self._key = key
        self._self = Leader(server_id=server_id, address=address, process=uuid.uuid4().hex)
        self._lease_s = lease_s
        self._clock = clock
        self._sleep = sleep
        self._told_s: float | None = None  # when somebody was last told that the store does not answer
        self.leader: Leader | None = None
        """Who leads, as far as this balancer knows."""

    async def win(self) -> Term:
        """Wait until this balancer leads, through any time that the store cannot be reached or refuses."""
        while True:
            try:
                term = await self._try()
                self._told_s = None
            except OSError as error:
                self.leader, term = None, None
                self._tell(error)
            if term is not None:
                self.leader = self._self
                return term
            await self._sleep(_RETRY_S)

    def _tell(self, error: OSError) -> None:
        now = self._clock()
        if self._told_s is None or now - self._told_s >= _SILENCE_TOLD_S:
            self._told_s = now
            log.warning("no leader can be elected, waiting: %s", error)

    async def _try(self) -> Term | None:
        """Stand when nobody leads, else wait until that changes."""
        holder = await self._kv.get(self._key)
        if holder is None:
            return await self._stand()
        leader = Leader.decode(holder.value)
        if leader.process == self._self.process:  # an earlier term of ours, given up before its lease was over
            await self._kv.transact(Guard(key=self._key, create_revision=holder.create_revision), deletes=[self._key])
            return await self._stand()
        if leader != self.leader:
            log.info("standing by: %s at %s leads", leader.server_id, leader.address or "an unknown address")
            self.leader = leader
        await self._kv.wait_deleted(self._key, holder.mod_revision, timeout_s=self._lease_s)
        return await self._stand() if await self._kv.get(self._key) is None else None

    async def _stand(self) -> Term | None:
        asked_s = self._clock()
        lease = await self._kv.grant(self._lease_s)
        value = self._self.encode()
        await self._kv.transact(Guard(key=self._key, create_revision=0), puts={self._key: value}, lease=lease.id)
        # Asked, not concluded: a transaction that was repeated may have succeeded the first time.
        holder = await self._kv.get(self._key)
        if holder is None or holder.lease != lease.id:
            await self._kv.revoke(lease.id)
            return None
        return Term(
            self._kv,
            guard=Guard(key=self._key, create_revision=holder.create_revision),
            lease=lease,
            granted_s=asked_s,
            clock=self._clock,
            sleep=self._sleep,
        )
