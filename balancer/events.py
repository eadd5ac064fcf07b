"""The numbered log of what happened to the mesh: bounded, readable from any point, followed as it grows."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

log = logging.getLogger(__name__)

EVENTS_KEPT = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """``subject`` is the server, the view or the layer that it is about; ``kind`` one of: balancer_started,
    balancer_leads, state_not_saved, state_saved, server_joined, server_returned, server_refused, drain_asked,
    server_draining, server_left, server_lost, server_fenced, waiting, view_published, view_serving, view_broken,
    view_adopted, view_over, paused, mode_changed, migration_planned, migration_staging, migration_committing,
    migration_committed, migration_aborted, migration_dropped, placement_adopted, apply_accepted, apply_dropped,
    solver_failed, solver_late, replicas_short, replicas_possible, scale_target, scale_wish, scale_failed.
    """

    number: int
    unix_s: float
    kind: str
    subject: str
    message: str


class EventLog:
    """Numbers go up from 1 and never start again while the state file lives.

    Args:
        wall_clock: seconds since 1970.
        past: events of an earlier process, oldest first.
        unsaved: how many more it may have had, whose numbers somebody has seen.
        heard: called with each new event.
    """

    def __init__(
        self,
        wall_clock: Callable[[], float],
        past: Iterable[Event] = (),
        unsaved: int = 0,
        heard: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._wall_clock = wall_clock
        self._unsaved = unsaved
        self._events = deque(past, maxlen=EVENTS_KEPT)
        self._heard = heard
        self._grown = asyncio.Event()

    @property
    def last_number(self) -> int:
        return self._events[-1].number if self._events else 0

    def add(self, kind: str, subject: str, message: str, level: int = logging.INFO) -> None:
        """Append, and write the same to the process's log."""
        event = Event(
            number=self.last_number + self._unsaved + 1,
            unix_s=self._wall_clock(),
            kind=kind,
            subject=subject,
            message=message,
        )
        self._unsaved = 0
        self._events.append(event)
        log.log(level, "%s %s: %s", kind, subject, message)
        self._heard(event)
        self._grown.set()
        self._grown = asyncio.Event()

    def after(self, number: int, limit: int = 0) -> list[Event]:
        """Events with a greater number, oldest first; with a limit the newest ones of them."""
        found = [event for event in self._events if event.number > number]
        return found[-limit:] if limit else found

    async def wait_beyond(self, number: int) -> None:
        """Until there is an event with a greater number."""
        while self.last_number <= number:
            await self._grown.wait()
