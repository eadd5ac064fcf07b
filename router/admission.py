"""How many requests a router holds at once, and which of them go when there are too many.

A full router makes room for a request of higher priority, or of a tenant with fewer requests, by shedding one that no
attention server has begun: what was started is never given up. A request whose deadline would pass while it waits is
refused at once.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from expertmesh.router.errors import Refusal

_RETRY_MS_RANGE = (50, 10_000)
_PACE_S = 30.0  # long beside the time of a batch

Shed = Callable[[Refusal], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """An admitted request."""

    tenant: str
    priority: int


class _Sheddable:
    """The requests that may be shed, so ordered that a full router looks at tenants and not at requests."""

    def __init__(self) -> None:
        self._classes: dict[int, dict[str, dict[str, Shed]]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def put(self, request_id: str, entry: _Entry, shed: Shed) -> None:
        requests = self._classes.setdefault(entry.priority, {}).setdefault(entry.tenant, {})
        self._num += request_id not in requests
        requests[request_id] = shed

    def remove(self, request_id: str, entry: _Entry) -> None:
        """Nothing happens if it is not there."""
        tenants = self._classes.get(entry.priority, {})
        requests = tenants.get(entry.tenant, {})
        if requests.pop(request_id, None) is None:
            return
        self._num -= 1
        if not requests:
            del tenants[entry.tenant]
            if not tenants:
                del self._classes[entry.priority]

    def least_worth(self, by_tenant: Mapping[str, int]) -> _Entry | None:
        """The lowest priority, of it the tenant with most requests; None when nothing may be shed."""
        if not self._classes:
            return None
        priority = max(self._classes)
        return _Entry(max(self._classes[priority], key=lambda tenant: by_tenant[tenant]), priority)

    def pop_last(self, entry: _Entry) -> Shed:
        """The newest request of that priority and tenant, which is no longer there then."""
        request_id, shed = next(reversed(self._classes[entry.priority][entry.tenant].items()))
        self.remove(request_id, entry)
        return shed


class _Pace:
    """How fast the mesh is: the mean time between two releases while requests wait, over about the last ``_PACE_S``.

    Over a time and not over a number of releases: requests that began together end together, hundreds of them in one
    step after seconds with none, and the pace is that of neither.
    """

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._time_s = 0.0  # what is longer ago counts for less, in this and in the next
        self._releases = 0.0

    @property
    def interval_s(self) -> float | None:
        """None = not known yet."""
        return self._time_s / self._releases if self._releases else None

    def released(self, now_s: float, others_wait: bool) -> None:
        """One more. Where none waits the pace is that of the arrivals, and so is that of the next one."""
        if others_wait and self._last_s is not None:
            passed_s = now_s - self._last_s
            kept = math.exp(-passed_s / _PACE_S)
            self._time_s = kept * self._time_s + passed_s
            self._releases = kept * self._releases + 1.0
        self._last_s = now_s if others_wait else None


class Admission:
    """Counts what runs. ``admit`` takes a place, ``release`` gives it back; nothing here waits.

    Args:
        max_requests: admitted and not finished.
        max_requests_per_tenant: the same, of one tenant.
        clock: seconds, monotonic.
        backlog: requests, of all routers, that wait on the attention servers for a place in their batches.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_requests_per_tenant: int,
        clock: Callable[[], float],
        backlog: Callable[[], int] = lambda: 0,
    ) -> None:
        self._max_requests = max_requests
        self._max_per_tenant = max_requests_per_tenant
        self._clock = clock
        self._backlog = backlog
        self._entries: dict[str, _Entry] = {}
        self._by_tenant: Counter[str] = Counter()
        self._sheddable = _Sheddable()
        self._pace = _Pace()
        self._closed_reason = ""
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def closed(self) -> bool:
        return bool(self._closed_reason)

    def holds(self, request_id: str) -> bool:
        return request_id in self._entries

    def close(self, reason: str) -> None:
        """From now on every request is refused with UNAVAILABLE and ``reason``."""
        self._closed_reason = reason
        self._note_empty()

    async def wait_empty(self, timeout_s: float) -> None:
        """After ``close``: until nothing runs.

        Raises:
            TimeoutError: something still does.
        """
        async with asyncio.timeout(timeout_s):
            await self._empty.wait()

    def admit(self, request_id: str, tenant: str, priority: int = 0, timeout_s: float | None = None) -> None:
        """Take a place.

        Args:
            priority: smaller goes first.
            timeout_s: until the request's deadline.

        Raises:
            Refusal: UNAVAILABLE after ``close``, ALREADY_EXISTS for an id that runs, RESOURCE_EXHAUSTED with a hint
                when to retry.
        """
        if self._closed_reason:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, self._closed_reason)
        if request_id in self._entries:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id: {request_id!r} is running; choose another one or leave it empty",
            )
        if self._by_tenant[tenant] >= self._max_per_tenant:
            raise self._full(
                f"tenant {tenant!r} has {self._by_tenant[tenant]} requests running (router.max_requests_per_tenant)"
            )
        self._check_deadline(timeout_s)
        if len(self) >= self._max_requests:
            self._make_room(tenant, priority)
        self._entries[request_id] = _Entry(tenant, priority)
        self._by_tenant[tenant] += 1

    def may_shed(self, request_id: str, shed: Shed | None) -> None:
        """From now on the request may be ended by ``shed``; ``None`` once it has begun."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        if shed is None:
            self._sheddable.remove(request_id, entry)
        else:
            self._sheddable.put(request_id, entry, shed)

    def release(self, request_id: str) -> None:
        self._forget(request_id)
        self._pace.released(self._clock(), self._num_waiting > 0)

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        self._sheddable.remove(request_id, entry)
        self._by_tenant[entry.tenant] -= 1
        if not self._by_tenant[entry.tenant]:
            del self._by_tenant[entry.tenant]
        self._note_empty()

    def _note_empty(self) -> None:
        if self.closed and not self._entries:
            self._empty.set()

    @property
    def _num_waiting(self) -> int:
        """Of the requests here: the pace that it is multiplied with is theirs, and not that of other routers'."""
        return min(self._backlog(), len(self._sheddable))

    def _check_deadline(self, timeout_s: float | None) -> None:
        waiting = self._num_waiting
        interval_s = self._pace.interval_s
        if timeout_s is None or not waiting or interval_s is None:
            return
        wait_s = waiting * interval_s
        if wait_s > timeout_s:
            raise self._full(f"{waiting} requests wait, about {wait_s:.1f} s, and the deadline is in {timeout_s:.1f} s")

    def _make_room(self, tenant: str, priority: int) -> None:
        """Shed the request that is worth least, if it is worth less than the new one.

        Raises:
            Refusal: it is not, or none can be shed.
        """
        problem = f"the router holds {len(self)} requests (router.max_queued_requests)"
        entry = self._sheddable.least_worth(self._by_tenant)
        if entry is None:
            raise self._full(problem)
        is_unfair = self._by_tenant[entry.tenant] > self._by_tenant[tenant] + 1
        if entry.priority < priority or (entry.priority == priority and not is_unfair):
            raise self._full(problem)
        shed = self._sheddable.pop_last(entry)
        is_less_urgent = entry.priority > priority
        why = "one of higher priority" if is_less_urgent else f"one of a tenant with fewer than {entry.tenant!r}"
        shed(self._full(f"{problem} and gave the place of this one, which had not begun, to {why}"))
        # Its handler releases it when it runs next; the new one has the place now.

    def _full(self, problem: str) -> Refusal:
        lowest, highest = _RETRY_MS_RANGE
        interval_s = self._pace.interval_s
        retry_after_ms = round(min(max(1000 * (1.0 if interval_s is None else interval_s), lowest), highest))
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{problem}; try again in {retry_after_ms} ms or later",
            retry_after_ms=retry_after_ms,
        )
