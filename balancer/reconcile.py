"""The balancer's loop: desired membership against what the servers report, one small action a tick.

Pure but for ``Effects``: time comes in as an argument, so every sequence of events can be replayed in a test.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from expertmesh.balancer.actual import LIVE, Actual, Phase
from expertmesh.balancer.control import PlacementControl
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.faults import Strikes
from expertmesh.balancer.formation import Formation
from expertmesh.balancer.losses import Losses
from expertmesh.balancer.members import Member
from expertmesh.balancer.placement_file import PlacementFile
from expertmesh.balancer.replicas import ReplicaRule
from expertmesh.balancer.scaling import Autoscaler
from expertmesh.balancer.scaling_target import ScaleTargets
from expertmesh.balancer.views import NoView, ViewPlan, next_view
from expertmesh.mesh.config import MeshConfig
from expertmesh.v1 import mesh_pb2


class Reconciler:
    """Call ``tick`` until it has nothing to do, whenever something came in or ``due_in_s`` have passed.

    Args:
        initial: mode offline: the placement that the first view starts with.
    """

    def __init__(
        self,
        config: MeshConfig,
        actual: Actual,
        *,
        control: PlacementControl,
        effects: Effects,
        events: EventLog,
        targets: ScaleTargets,
        autoscaler: Autoscaler,
        store_address: str,
        initial: PlacementFile | None = None,
    ) -> None:
        self._config = config
        self._settings = config.balancer
        self._actual = actual
        self._effects = effects
        self._events = events
        self._formation = Formation(config.balancer, actual, targets)
        self._store_address = store_address
        self._initial = initial
        self._rule = ReplicaRule.of(config.expert)
        self._known_loads = control.online.known_loads
        self._losses = Losses(config.balancer, actual, effects=effects, events=events)
        self._strikes = Strikes(config.balancer.view_timeout_s)
        self._num_retries = 0  # views of the same members in a row
        self._wanted: frozenset[tuple[str, str]] = frozenset()
        self._wanted_s = 0.0  # when the wanted membership last changed
        self._steps = (
            self._losses.lose,
            self._losses.fence_culprit,
            self._adopt,
            control.migrations.tick,  # before the next view: what ranks have switched to is what it starts from
            self._form,
            self._change_view,
            self._tell,
            control.applying.tick,
            control.upkeep.tick,
            control.online.tick,
            autoscaler.tick,
            self._losses.forget,
        )

    def tick(self, now: float) -> str | None:
        """Take the next action that is due. Returns what was done, None when nothing was."""
        self._losses.forgive_own_stall(now)
        for step in self._steps:
            action = step(now)
            if action is not None:
                return action
        return None

    def due_in_s(self, now: float) -> float:
        """When to tick again if nothing comes in."""
        hurried = (
            self._actual.phase in (Phase.BROKEN, Phase.ADOPTING) or now - self._wanted_s <= self._settings.settle_s
        )
        return max(self._settings.settle_s / 2, 0.005) if hurried else self._settings.heartbeat_s / 2

    # The view that is there.

    def _adopt(self, now: float) -> str | None:
        """After a restart: keep the view when all its ranks come back to it, else go on from those who do."""
        actual = self._actual
        if actual.phase is not Phase.ADOPTING:
            return None
        if actual.adopt_until_s is None:
            actual.adopt_until_s = now + self._settings.lease_s
        suspects = {suspect for named in actual.reports.values() for suspect in named}
        ids = [rank.server_id for rank in actual.view.ranks]
        missing = [s for s in ids if actual.members.get(s) is None and s not in suspects]
        if missing and now < actual.adopt_until_s:
            return None
        own = actual.view_members()
        ready = [member for member in own if actual.is_ready(member)]
        self._formation.had_view = bool(own)
        subject, back = f"view {actual.view.number}", f"{len(ready)} of its {len(ids)} ranks came back to it"
        if len(ready) == len(ids) and not actual.reports:
            actual.set_phase(Phase.SERVING, now)
            self._events.add("view_adopted", subject, back)
        elif ready or actual.reports:
            actual.set_phase(Phase.BROKEN, now)
            self._events.add("view_broken", subject, back, logging.WARNING)
        else:
            actual.set_phase(Phase.NONE, now)
            self._events.add("view_over", subject, back)
        self._save()
        return f"adopted {subject}: {actual.phase}"

    def _form(self, now: float) -> str | None:
        """A forming view serves when every rank is ready, and is given up when some are not in time."""
        actual, number = self._actual, self._actual.view.number
        if actual.phase is not Phase.FORMING:
            return None
        present = actual.view_members()
        late = [member for member in present if not actual.is_ready(member)]
        if not late and len(present) == len(actual.view.ranks):
            actual.set_phase(Phase.SERVING, now)
            for member in present:
                self._strikes.clear(member.server_id)
            self._events.add("view_serving", f"view {number}", f"all {len(present)} ranks are ready")
            return f"view {number} serves"
        if not late or now - actual.phase_s < self._settings.view_timeout_s:
            return None
        actual.set_phase(Phase.BROKEN, now)
        if len(late) == len(actual.view.ranks):  # nobody is to blame alone
            self._events.add("view_broken", f"view {number}", "no rank was ready in time", logging.WARNING)
            return f"gave view {number} up"
        for member in late:
            wait_s = self._strikes.add(member.server_id, now)
            why = f"it was not ready for view {number} within {self._settings.view_timeout_s:g} s"
            self._losses.give_up(member, "server_fenced", why + (f"; kept out for {wait_s:g} s" if wait_s else ""))
        return f"fenced {len(late)} ranks that were late for view {number}"

    # The view that should be there.

    def _candidates(self, now: float) -> list[Member]:
        """Ranks that belong in the next view. A closed stream alone takes nobody out of a view that serves."""
        actual = self._actual
        return [
            member
            for member in actual.members.ranks()
            if not member.draining
            and not self._strikes.is_waiting(member.server_id, now)
            and (member.session is not None or (actual.phase is Phase.SERVING and actual.is_in_view(member)))
        ]

    def _change_view(self, now: float) -> str | None:
        actual = self._actual
        if actual.phase is Phase.ADOPTING:
            return None
        candidates = self._candidates(now)
        wanted = frozenset(member.key for member in candidates)
        if wanted != self._wanted:
            self._wanted, self._wanted_s = wanted, now
        present = frozenset((rank.server_id, rank.incarnation) for rank in actual.view.ranks)
        if actual.phase is Phase.SERVING and wanted == present:
            return None
        if actual.phase is Phase.FORMING and wanted >= present:  # joins wait until the view stands
            return None
        if actual.phase is Phase.NONE:
            waiting_for = self._formation.waits_for(candidates, now - self._wanted_s, now)
            if waiting_for is not None:
                return self._pause(waiting_for, now)
        if now < self._settled_s(wanted == present) or self._waits_for_proof(candidates):
            return None
        return self._publish(candidates, now)

    def _settled_s(self, same_members: bool) -> float:
        """From when on the next view may be published; one that keeps breaking comes back more and more slowly."""
        delay_s = self._settings.settle_s
        if same_members:
            delay_s = min(delay_s * 2.0**self._num_retries, self._settings.lease_s)
        broken_s = self._actual.phase_s if self._actual.phase is Phase.BROKEN else 0.0
        return max(self._wanted_s, broken_s) + delay_s

    def _waits_for_proof(self, candidates: Sequence[Member]) -> bool:
        """A member without a stream could not hear of a view, and a suspect that hangs would stall it: both get until
        the end of their lease to show that they live."""
        broken = self._actual.phase is Phase.BROKEN
        suspects = {suspect for named in self._actual.reports.values() for suspect in named}
        return any(
            member.session is None
            or (broken and member.server_id in suspects and member.last_seen_s < self._actual.phase_s)
            for member in candidates
        )

    def _publish(self, candidates: Sequence[Member], now: float) -> str | None:
        actual = self._actual
        plan = ViewPlan(
            number=max(actual.highest_number, actual.view.number) + 1,
            num_slots=self._config.expert.num_slots,
            store_address=self._store_address,
            secret=self._effects.new_secret(),
            fingerprint=actual.fingerprint,
            ledger=actual.ledger,
            initial=self._initial,
            loads=self._known_loads(),
            rule=self._rule,
        )
        view = next_view(candidates, plan, actual.view)
        if isinstance(view, NoView):
            return self._pause(view.reason, now)
        why = self._why_changed()
        if why == "broken":  # a death explains itself
            self._losses.suspicions.record(actual.reports, now)
        self._num_retries = self._num_retries + 1 if why == "broken" else 0
        self._formation.had_view = True
        actual.view = view
        actual.reports.clear()
        actual.set_phase(Phase.FORMING, now)
        names = ", ".join(rank.server_id for rank in view.ranks)
        self._events.add("view_published", f"view {view.number}", f"{why}: {names}")
        view.traceparent = self._effects.view_published(view, why)
        self._save()
        return f"published view {view.number} ({why})"

    def _why_changed(self) -> str:
        if self._actual.phase is Phase.NONE:
            return "formation"
        before = {(rank.server_id, rank.incarnation) for rank in self._actual.view.ranks}
        gone = [self._actual.members.get(server_id) for server_id, _ in before - self._wanted]
        if gone:
            return "leave" if all(member is None or member.draining for member in gone) else "death"
        return "broken" if self._wanted == before else "join"

    def _pause(self, reason: str, now: float) -> str | None:
        actual = self._actual
        if actual.phase is Phase.NONE and actual.pause_reason == reason:
            return None
        actual.pause_reason = reason
        if actual.phase in LIVE:
            actual.set_phase(Phase.NONE, now)
            actual.reports.clear()
            self._events.add("paused", f"view {actual.view.number}", reason, logging.WARNING)
            self._save()
        else:
            self._events.add("waiting", "mesh", reason)
        return f"paused: {reason}"

    def _tell(self, now: float) -> str | None:
        """Bring every open stream up to date: the view that lives, or why there is none."""
        actual, told = self._actual, 0
        for member in actual.members.live():
            if member.session is None:
                continue
            if actual.phase in (Phase.FORMING, Phase.SERVING) and member.sent_view != actual.view.number:
                self._effects.send(member.session, mesh_pb2.JoinResponse(view=self._view_for(member)))
                actual.members.change(member, sent_view=actual.view.number, sent_pause="")
            elif actual.phase is Phase.NONE and member.sent_pause != actual.pause_reason:
                pause = mesh_pb2.Pause(reason=actual.pause_reason)
                self._effects.send(member.session, mesh_pb2.JoinResponse(pause=pause))
                actual.members.change(member, sent_pause=actual.pause_reason)
            else:
                continue
            told += 1
        what = "the pause" if actual.phase is Phase.NONE else f"view {actual.view.number}"
        return f"told {told} servers of {what}" if told else None

    def _view_for(self, member: Member) -> mesh_pb2.View:
        """The secret is for the view's ranks alone."""
        if self._actual.is_in_view(member):
            return self._actual.view
        without_secret = mesh_pb2.View.FromString(self._actual.view.SerializeToString())
        without_secret.ClearField("secret")
        return without_secret

    def _save(self) -> None:
        self._effects.save(self._actual.durable())
