"""Members that are gone: whose stream closed or fell silent, and whom its peers blame each time that a view breaks."""

from __future__ import annotations

import logging

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.faults import Suspicions
from expertmesh.balancer.members import Member
from expertmesh.mesh.config import BalancerConfig
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

LOST_KEPT_S = 300.0
"""How long a lost server is still shown in the status."""


class Losses:
    """The part of the reconcile loop that gives members up. Its steps return what was done, None when nothing was."""

    def __init__(self, settings: BalancerConfig, actual: Actual, *, effects: Effects, events: EventLog) -> None:
        self._settings = settings
        self._actual = actual
        self._effects = effects
        self._events = events
        self._last_tick_s: float | None = None
        self.suspicions = Suspicions()

    def forgive_own_stall(self, now: float) -> None:
        """When this process itself stood still, unread heartbeats wait in its sockets: silence proves nothing."""
        stalled_s = 0.0 if self._last_tick_s is None else now - self._last_tick_s
        if stalled_s > self._settings.lease_s / 2:
            log.warning("the balancer stood still for %.1f s; leases are extended by it", stalled_s)
            for member in self._actual.members.live():
                self._actual.members.change(member, last_seen_s=min(now, member.last_seen_s + stalled_s))
        self._last_tick_s = now

    def lose(self, now: float) -> str | None:
        """Let go who has left, give up whose stream is silent for too long."""
        for member in self._actual.members.live():
            if member.draining and member.session is None:
                self._actual.members.remove(member)
                self._actual.remember_fenced(member.incarnation)
                self._events.add("server_left", member.server_id, "its stream closed after it said that it leaves")
                return f"let {member.server_id} go"
            why = self._why_lost(member, now)
            if why is not None:
                self.give_up(member, "server_lost", why)
                return f"gave {member.server_id} up"
        return None

    def _why_lost(self, member: Member, now: float) -> str | None:
        actual, silent_s = self._actual, now - member.last_seen_s
        if member.session is None and actual.phase in (Phase.FORMING, Phase.BROKEN) and actual.is_in_view(member):
            return f"its stream is closed and view {actual.view.number} is {actual.phase}"
        if silent_s > self._silence_s(member):
            return f"its stream is {'closed' if member.session is None else 'silent'} for {silent_s:.1f} s"
        return None

    def _silence_s(self, member: Member) -> float:
        """A GPU rank whose stream is open may be silent for as long as it may take to join a view."""
        actual, settings = self._actual, self._settings
        is_joining = actual.phase is Phase.FORMING and actual.is_in_view(member) and not actual.is_ready(member)
        if is_joining and member.registration.on_gpu and member.session is not None:
            return max(settings.lease_s, settings.view_timeout_s)
        return settings.lease_s

    def give_up(self, member: Member, kind: str, why: str) -> None:
        """A rank is told that it is fenced, where its stream is open, and may not come back as it was."""
        if member.is_rank:
            self._actual.remember_fenced(member.incarnation)
        if member.session is not None:
            if member.is_rank:
                self._effects.send(member.session, mesh_pb2.JoinResponse(fenced=mesh_pb2.Fenced(reason=why)))
            self._effects.close(member.session)
        self._actual.members.change(member, lost=True, session=None)
        self._events.add(kind, member.server_id, why, logging.WARNING)

    def fence_culprit(self, now: float) -> str | None:
        """Give up whom several broken views in a row point at (``suspicions``)."""
        culprit = self.suspicions.culprit(now)
        member = None if culprit is None else self._actual.members.get(culprit)
        if member is None or member.lost:
            return None
        self.suspicions.clear()
        self.give_up(member, "server_fenced", "its peers named it each time that a view broke")
        return f"fenced {member.server_id}"

    def forget(self, now: float) -> str | None:
        """The status shows a lost server for a while."""
        for member in self._actual.members:
            if member.lost and now - member.last_seen_s > LOST_KEPT_S:
                self._actual.members.remove(member)
                return f"forgot {member.server_id}"
        return None
