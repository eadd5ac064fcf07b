"""How many requests a router holds at once: over all, by tenant, and each request id once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import grpc

from expertmesh.router.errors import Refusal

_RETRY_MS_RANGE = (50, 10_000)
_INTERVAL_WEIGHT = 0.1  # of the newest interval in the moving average


class Admission:
    """Counts what runs. ``admit`` takes a place, ``release`` gives it back; nothing here waits.

    Args:
        max_requests: admitted and not finished.
        max_requests_per_tenant: the same, of one tenant.
        clock: seconds, monotonic.
    """

    def __init__(self, *, max_requests: int, max_requests_per_tenant: int, clock: Callable[[], float]) -> None:
        self._max_requests = max_requests
        self._max_per_tenant = max_requests_per_tenant
        self._clock = clock
        self._tenant_of: dict[str, str] = {}
        self._by_tenant: Counter[str] = Counter()
        self._last_release_s: float | None = None
        self._release_interval_s = 1.0
        self._closed_reason = ""
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tenant_of)

    @property
    def closed(self) -> bool:
        return bool(self._closed_reason)

    def holds(self, request_id: str) -> bool:
        return request_id in self._tenant_of

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

    def admit(self, request_id: str, tenant: str) -> None:
        """Take a place.

        Raises:
            Refusal: UNAVAILABLE after ``close``, ALREADY_EXISTS for an id that runs, RESOURCE_EXHAUSTED with a hint
                when to retry.
        """
        if self._closed_reason:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, self._closed_reason)
        if request_id in self._tenant_of:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"request_id: {request_id!r} is running; choose another one or leave it empty",
            )
        if len(self) >= self._max_requests:
            raise self._full(f"the router holds {len(self)} requests (router.max_queued_requests)")
        if self._by_tenant[tenant] >= self._max_per_tenant:
            raise self._full(
                f"tenant {tenant!r} has {self._by_tenant[tenant]} requests running (router.max_requests_per_tenant)"
            )
        self._tenant_of[request_id] = tenant
        self._by_tenant[tenant] += 1

    def release(self, request_id: str) -> None:
        tenant = self._tenant_of.pop(request_id)
        self._by_tenant[tenant] -= 1
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        now_s = self._clock()
        if self._last_release_s is not None:
            interval_s = now_s - self._last_release_s
            self._release_interval_s += _INTERVAL_WEIGHT * (interval_s - self._release_interval_s)
        self._last_release_s = now_s
        self._note_empty()

    def _note_empty(self) -> None:
        if self.closed and not self._tenant_of:
            self._empty.set()

    def _full(self, problem: str) -> Refusal:
        lowest, highest = _RETRY_MS_RANGE
        retry_after_ms = round(min(max(self._release_interval_s * 1000, lowest), highest))
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{problem}; try again in {retry_after_ms} ms or later",
            retry_after_ms=retry_after_ms,
        )
