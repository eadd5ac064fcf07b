"""The scale policy at work: looks at the mesh every so often, and has servers started and drained, or says what it
would do.

Pure but for what it changes; time comes in as an argument.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.draining import Draining, why_needed
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.members import Member
from expertmesh.balancer.scaling_policy import (
    Change,
    Governor,
    RoleSnapshot,
    ScalePolicy,
    ScaleSnapshot,
    checked_wishes,
)
from expertmesh.balancer.scaling_target import ROLES, ScaleTargets
from expertmesh.mesh.config import MeshConfig

BY = "the scale policy"
PATIENCE_S = 120.0
"""A server that was asked for and has not come by then is not waited for any longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Raised:
    """What this policy asked for last."""

    role: str
    target: int
    since_s: float


class Autoscaler:
    """``scaling.policy``: off, dry-run or on."""

    def __init__(
        self,
        config: MeshConfig,
        actual: Actual,
        targets: ScaleTargets,
        draining: Draining,
        events: EventLog,
        policy: ScalePolicy,
    ) -> None:
        self._settings = config.scaling
        self._expert = config.expert
        self._actual = actual
        self._targets = targets
        self._draining = draining
        self._events = events
        self._policy = policy
        self._governor = Governor(config.scaling)
        self._look_s = 0.0
        self._raised: _Raised | None = None
        self._told = ""  # the last thing that was said and not done

    def tick(self, now: float) -> str | None:
        """Look, if it is time, and take the action that is due. Returns what was done, None when nothing was."""
        if self._settings.policy == "off" or self._actual.phase is not Phase.SERVING or now < self._look_s:
            return None
        self._look_s = now + self._settings.interval_s
        given_up = self._give_up(now)
        if given_up is not None:
            return given_up
        snapshot = self.snapshot()
        try:
            wishes = checked_wishes(self._policy(snapshot, self._settings), snapshot.roles)
        except Exception as error:  # noqa: BLE001 - somebody else's function must not take the control plane along
            self._say("scale_failed", "balancer", f"the policy failed: {type(error).__name__}: {error}", logging.ERROR)
            return None
        change = self._governor.decide(wishes, snapshot.roles, now)
        if change is None:
            if all(wish.servers == snapshot.roles[role].target for role, wish in wishes.items()):
                self._told = ""
            return None
        return self._carry_out(change, now)

    def snapshot(self) -> ScaleSnapshot:
        """The mesh as its servers reported it last."""
        ranks = [member for member in self._actual.staying() if member.is_rank]
        attention = [member.load for member in ranks if member.has_attention and member.load is not None]
        waiting = [m.load.num_requests_waiting for m in self._actual.members.live() if m.load is not None]
        times = [load.token_s for load in attention if load.token_s > 0]
        num_experts = self._actual.model.num_experts
        slots = [min(member.registration.num_slots, num_experts) for member in ranks if member.has_experts]
        return ScaleSnapshot(
            roles={role: self._role(role) for role in ROLES},
            requests_running=sum(load.num_requests_running for load in attention),
            requests_waiting=sum(waiting),
            max_requests=sum(load.max_num_requests for load in attention),
            kv_cache_usage=sum(load.kv_cache_usage for load in attention) / max(len(attention), 1),
            tpot_s=sum(times) / len(times) if times else None,
            slots_needed=max(self._expert.min_slots(num_experts), self._expert.num_slots or 0),
            slots_there=sum(slots),
            slots_without_one=sum(slots) - max(slots, default=0),
        )

    def _role(self, role: str) -> RoleSnapshot:
        servers = self._targets.servers(role)
        present = [m for m in self._actual.members.live() if m.role_name == role]
        return RoleSnapshot(
            target=self._targets.targets[role], servers=len(servers), leaving=len(present) - len(servers)
        )

    def _give_up(self, now: float) -> str | None:
        """Nobody started the server that was asked for: do not wait for it."""
        raised = self._raised
        if raised is None or self._targets.targets[raised.role] != raised.target:
            self._raised = None
            return None
        there = len(self._targets.servers(raised.role))
        if there >= raised.target:
            self._raised = None
        elif now - raised.since_s > PATIENCE_S:
            self._raised = None
            text = f"no {raised.role} server came within {PATIENCE_S:g} s of being asked for"
            self._events.add("scale_failed", raised.role, text, logging.WARNING)
            self._targets.set(raised.role, raised.target - 1, BY)
            return f"gave up to wait for {raised.role} server {raised.target}"
        return None

    def _carry_out(self, change: Change, now: float) -> str | None:
        what = f"{change.before} → {change.after} servers: {change.why}"
        if self._settings.policy == "dry-run":
            return self._say("scale_wish", change.role, f"would be {what}")
        if change.after < change.before:
            return self._drain(change, what)
        if not self._targets.launchers:
            return self._say("scale_wish", change.role, f"{what}; no launcher watches that could start one")
        self._targets.set(change.role, change.after, f"{BY} ({change.why})")
        self._raised = _Raised(role=change.role, target=change.after, since_s=now)
        self._told = ""
        return f"asked for {change.after} {change.role} servers"

    def _drain(self, change: Change, what: str) -> str | None:
        """The one that is missed least, of those that can be spared."""
        staying = self._actual.staying()
        for member in _least_missed_first(self._targets.servers(change.role)):
            others = [other for other in staying if other is not member]
            if member.session is not None and why_needed(member, others) is None:
                self._draining.ask(member, f"{BY} ({change.why})")
                self._told = ""
                return f"drained {member.server_id}"
        return self._say("scale_wish", change.role, f"{what}; but none can be spared")

    def _say(self, kind: str, subject: str, message: str, level: int = logging.INFO) -> str | None:
        """Once, until something else is to be said."""
        key = f"{kind} {subject} {message.partition(':')[0]}"
        if key == self._told:
            return None
        self._told = key
        self._events.add(kind, subject, message, level)
        return f"said {kind} of {subject}"


def _least_missed_first(members: Sequence[Member]) -> list[Member]:
    """Fewest requests; of those the one with the highest number in its name."""

    def requests(member: Member) -> int:
        load = member.load
        return 0 if load is None else load.num_requests_running + load.num_requests_waiting

    named = sorted(members, key=lambda member: (len(member.server_id), member.server_id), reverse=True)
    return sorted(named, key=requests)
