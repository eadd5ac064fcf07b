"""The actual state of the mesh: its members, and where the view published last stands.

Pure but for ``Effects``; time comes in as an argument. What the streams bring changes it here; what to do about it is
the reconciler's business.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Sequence
from copy import deepcopy

from expertmesh.balancer import door
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.members import Member, Members
from expertmesh.balancer.state import DurableState
from expertmesh.mesh.config import BalancerConfig
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

FENCED_KEPT = 1024
REFUSED_KEPT = 1024
NO_SERVERS = "no attention or expert server is in the mesh: start them"


class Phase(enum.StrEnum):
    """Where the view published last stands."""

    NONE = "none"  # no view, or it is over: serving is paused
    ADOPTING = "adopting"  # after a restart: waiting for the view's ranks to come back
    FORMING = "forming"  # published, not every rank is ready
    SERVING = "serving"
    BROKEN = "broken"  # a rank reported it


LIVE = frozenset({Phase.ADOPTING, Phase.FORMING, Phase.SERVING, Phase.BROKEN})


class Actual:
    """``view`` was published last; ``phase`` says whether and how it lives, ``pause_reason`` why there is none."""

    def __init__(self, config: BalancerConfig, *, effects: Effects, events: EventLog, state: DurableState) -> None:
        self.members = Members()
        self.view = state.view
        self.phase = Phase.ADOPTING if state.view.number else Phase.NONE
        self.phase_s = 0.0  # when the phase began
        self.pause_reason = NO_SERVERS
        self.mesh_id = state.mesh_id
        self.model = mesh_pb2.ModelShape()
        self.reports: dict[str, Sequence[str]] = {}  # reporter → suspects, of the current view
        self.adopt_until_s: float | None = None
        self.highest_number = state.view.number  # of any view that anybody spoke of: numbers are never used twice
        self.ledger = deepcopy(state.ledger)
        self.mode_switch = state.mode_switch
        self.scale = state.scale
        self.statuses: deque[tuple[str, mesh_pb2.MigrationStatus]] = deque()  # of the view's ranks, not heard yet
        self._config = config
        self._effects = effects
        self._events = events
        self._fingerprint = state.fingerprint
        self._fenced = dict.fromkeys(state.fenced)
        self._refused: dict[str, str] = {}  # server id → why, so that a server that tries again is not news

    @property
    def fingerprint(self) -> str:
        """Of the mesh's checkpoint and dtype; '' while no rank has come."""
        return self._fingerprint

    # What the streams bring.

    def register(self, session: int, registration: mesh_pb2.Registration, now: float) -> door.Verdict:
        """The first message of a stream. Unless the server is refused, a Welcome is sent."""
        verdict = door.judge(
            registration,
            members=self.members,
            view=self.view,
            may_adopt=self.phase in (Phase.NONE, Phase.ADOPTING),
            fingerprint=self._fingerprint if self.phase is Phase.ADOPTING or self.members.live() else "",
            fenced=self._fenced,
        )
        self.highest_number = max(self.highest_number, registration.view_number, registration.highest_view_number)
        if not isinstance(verdict, door.Welcomed):
            why = verdict.message if isinstance(verdict, door.Refused) else verdict.reason
            self._refuse(registration.server_id, why)
            if isinstance(verdict, door.Over):
                self._welcome(session)
                fenced = mesh_pb2.Fenced(reason=verdict.reason)
                self._effects.send(session, mesh_pb2.JoinResponse(fenced=fenced))
                self._effects.close(session)
            return verdict
        if self._should_adopt(registration):
            self.set_phase(Phase.ADOPTING, now)
            self.view = mesh_pb2.View.FromString(registration.view.SerializeToString())
            self.adopt_until_s = now + self._config.lease_s
            self.reports.clear()
        self._admit(session, registration, now)
        return verdict

    def _refuse(self, server_id: str, why: str) -> None:
        if self._refused.get(server_id) != why:
            self._events.add("server_refused", server_id, why, logging.WARNING)
        if len(self._refused) >= REFUSED_KEPT:
            self._refused.clear()
        self._refused[server_id] = why

    def _should_adopt(self, registration: mesh_pb2.Registration) -> bool:
        if self.phase is Phase.NONE:
            known = self.members.get(registration.server_id)
            is_new = known is None or known.incarnation != registration.incarnation
            return is_new and door.brings_view(registration, self.view)
        newer = registration.view.number > self.view.number
        return self.phase is Phase.ADOPTING and newer and door.brings_view(registration, self.view)

    def _admit(self, session: int, registration: mesh_pb2.Registration, now: float) -> None:
        known = self.members.get(registration.server_id)
        returned = known is not None and known.incarnation == registration.incarnation and not known.lost
        in_view = registration.view_number == self.view.number > 0 and registration.view_secret == self.view.secret
        if in_view and self.phase in LIVE:
            self._believe_placement(registration)
        stored = mesh_pb2.Registration.FromString(registration.SerializeToString())
        stored.ClearField("view")
        member = Member(
            registration=stored,
            session=session,
            last_seen_s=now,
            draining=returned and known is not None and known.draining,
            ready_view=self.view.number if in_view else 0,
            sent_view=self.view.number if in_view else 0,
        )
        if known is not None and known.session is not None:
            self._effects.close(known.session)
        if known is not None and not returned and known.is_rank:
            self.remember_fenced(known.incarnation)
        self.members.put(member)
        self._refused.pop(member.server_id, None)
        self._fingerprint = registration.fingerprint or self._fingerprint
        if member.is_rank:
            self.model = stored.model
        if returned and known is not None and known.ready_view == self.view.number != member.ready_view:
            self._report(member, "it came back without its view", (), now)
        self._welcome(session)
        if self.scale is not None and known is not None and not returned and self.was_asked_to_leave(known):
            self.scale = self.scale.with_leaving(member.incarnation)  # it was lost, fenced or killed before it could
        if self.was_asked_to_leave(member) and not member.draining:  # perhaps it never heard
            self._effects.send(session, mesh_pb2.JoinResponse(drain=mesh_pb2.Drain(reason="it was asked before")))
        came_back = returned or in_view
        what = "came back" if came_back else "registered"
        self._events.add(
            "server_returned" if came_back else "server_joined",
            member.server_id,
            f"{member.role_name} {what} from {stored.node or 'an unnamed node'}, pid {stored.pid}",
        )

    def _believe_placement(self, registration: mesh_pb2.Registration) -> None:
        """All ranks switch at the same step: what one of them runs is in force, whether we heard of it or not."""
        for placement in registration.view.placement:
            current = self.layer_placement(placement.layer)
            if current is not None and placement.version > current.version:
                self.set_layer_placement(placement)
                text = f"{registration.server_id} runs version {placement.version}, {current.version} was known here"
                self._events.add("placement_adopted", f"layer {placement.layer}", text)

    def _welcome(self, session: int) -> None:
        settings = self._config
        welcome = mesh_pb2.Welcome(mesh_id=self.mesh_id, heartbeat_s=settings.heartbeat_s, lease_s=settings.lease_s)
        self._effects.send(session, mesh_pb2.JoinResponse(welcome=welcome))

    def receive(self, session: int, request: mesh_pb2.JoinRequest, now: float) -> None:
        """Any later message of a stream."""
        member = self.members.of_session(session)
        if member is None:  # fenced or replaced while the message was on its way
            return
        member = self.members.change(member, last_seen_s=now)
        kind = request.WhichOneof("message")
        if kind == "heartbeat":
            self._heard(member, request.heartbeat, now)
        elif kind == "view_ready" and request.view_ready.view_number == self.view.number:
            self.members.change(member, ready_view=self.view.number)
        elif kind == "view_broken" and request.view_broken.view_number == self.view.number:
            self._report(member, request.view_broken.reason, tuple(request.view_broken.suspects), now)
        elif kind == "leaving":
            self._leave(member, request.leaving.reason)
        elif kind == "migration" and self.is_in_view(member):
            self.statuses.append((member.server_id, request.migration))

    def _heard(self, member: Member, heartbeat: mesh_pb2.Heartbeat, now: float) -> None:
        """Heartbeats repeat what a message said that a broken stream may have swallowed."""
        if heartbeat.HasField("load"):
            member = self.members.change(member, load=heartbeat.load)
        if heartbeat.state == mesh_pb2.SERVER_STATE_DRAINING:
            self._leave(member, "it is draining")
        if heartbeat.view_number != self.view.number:
            return
        if heartbeat.state == mesh_pb2.SERVER_STATE_SERVING:
            self.members.change(member, ready_view=self.view.number)
        elif heartbeat.state == mesh_pb2.SERVER_STATE_BROKEN and member.server_id not in self.reports:
            self._report(member, "a heartbeat says so", (), now)

    def _leave(self, member: Member, reason: str) -> None:
        if not member.draining:
            self.members.change(member, draining=True)
            self._events.add("server_draining", member.server_id, reason or "no reason given")

    def _report(self, member: Member, reason: str, suspects: Sequence[str], now: float) -> None:
        """A rank says that the current view broke."""
        if not (self.phase in LIVE and self.is_in_view(member)):
            return
        self.reports[member.server_id] = suspects
        named = f"; it suspects {', '.join(suspects)}" if suspects else ""
        self._events.add("view_broken", member.server_id, f"view {self.view.number}: {reason}{named}", logging.WARNING)
        if self.phase in (Phase.FORMING, Phase.SERVING):
            self.set_phase(Phase.BROKEN, now)

    def stream_closed(self, session: int, now: float) -> None:
        """The stream ended, whoever ended it. The lease runs from here."""
        member = self.members.of_session(session)
        if member is not None:
            self.members.change(member, session=None, last_seen_s=now)
            log.info("the stream of %s closed", member.server_id)

    # What is.

    def is_in_view(self, member: Member) -> bool:
        return door.is_in(self.view, member.registration)

    def was_asked_to_leave(self, member: Member) -> bool:
        """By a drain that it has not said to follow yet, or by one that it follows."""
        return self.scale is not None and member.incarnation in self.scale.leaving

    def staying(self) -> list[Member]:
        """Live servers that neither leave nor were asked to."""
        return [m for m in self.members.live() if not m.draining and not self.was_asked_to_leave(m)]

    def state_of(self, member: Member) -> mesh_pb2.ServerState.ValueType:
        if member.lost:
            return mesh_pb2.SERVER_STATE_LOST
        if member.draining:
            return mesh_pb2.SERVER_STATE_DRAINING
        if not member.is_rank:
            return mesh_pb2.SERVER_STATE_SERVING
        if self.phase not in LIVE or not self.is_in_view(member):
            return mesh_pb2.SERVER_STATE_STARTING
        if self.phase is Phase.BROKEN:
            return mesh_pb2.SERVER_STATE_BROKEN
        return mesh_pb2.SERVER_STATE_SERVING if self.is_ready(member) else mesh_pb2.SERVER_STATE_JOINING

    def durable(self) -> DurableState:
        return DurableState(
            mesh_id=self.mesh_id,
            view=self.view,
            fingerprint=self._fingerprint,
            fenced=tuple(self._fenced),
            events=tuple(self._events.after(0)),
            ledger=deepcopy(self.ledger),
            mode_switch=self.mode_switch,
            scale=self.scale,
        )

    def layer_placement(self, layer: int) -> mesh_pb2.LayerPlacement | None:
        """Of the view published last; None when the model has no such MoE layer."""
        return next((placement for placement in self.view.placement if placement.layer == layer), None)

    def set_layer_placement(self, placement: mesh_pb2.LayerPlacement) -> None:
        """A layer has got another placement. The view is replaced, not changed: others may hold it."""
        view = mesh_pb2.View.FromString(self.view.SerializeToString())
        for old in view.placement:
            if old.layer == placement.layer:
                old.CopyFrom(placement)
        self.view = view

    def is_ready(self, member: Member) -> bool:
        return member.ready_view == self.view.number

    def view_members(self) -> list[Member]:
        """The view's ranks that are members still and not lost."""
        return [member for member in self.members.live() if self.is_in_view(member)]

    def why_not_serving(self) -> str:
        """Empty while the view serves."""
        number = self.view.number
        if self.phase is Phase.SERVING:
            return ""
        if self.phase is Phase.NONE:
            return self.pause_reason
        if self.phase is Phase.ADOPTING:
            return f"the balancer restarted: waiting for the ranks of view {number}"
        if self.phase is Phase.BROKEN:
            return f"view {number} broke: the next one is on its way"
        late = [member.server_id for member in self.view_members() if not self.is_ready(member)]
        return f"view {number} is forming: waiting for {', '.join(late) or 'its last ranks'}"

    def set_phase(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self.phase_s = now

    def remember_fenced(self, incarnation: str) -> None:
        self._fenced[incarnation] = None
        while len(self._fenced) > FENCED_KEPT:
            del self._fenced[next(iter(self._fenced))]
