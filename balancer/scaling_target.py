"""How many servers of each role there should be: a durable number that administrators and the scale policy change.

The balancer cannot start a process. Whoever can watches the number: `expertmesh up` here, an operator of Slurm or
Kubernetes elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import grpc

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.members import ROLE_NAMES, Member
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.state import ScaleState
from expertmesh.mesh.config import MeshConfig
from expertmesh.v1 import admin_pb2, mesh_pb2

ROLES = {
    "attention": mesh_pb2.ROLE_ATTENTION,
    "expert": mesh_pb2.ROLE_EXPERT,
    "both": mesh_pb2.ROLE_BOTH,
}
MAX_SERVERS = 4096
"""Of a role: a target beyond it is a mistake."""


class ScaleTargets:
    """What the configuration says, until somebody changes it; also then it holds again when it changes itself."""

    def __init__(self, config: MeshConfig, actual: Actual, effects: Effects, events: EventLog) -> None:
        configured = {
            "attention": config.attention.servers,
            "expert": config.expert.servers,
            "both": config.both_servers,
        }
        known = actual.scale
        if known is None or known.configured != configured:
            version = 1 if known is None else known.version + 1
            leaving = () if known is None else known.leaving
            known = ScaleState(version=version, targets=dict(configured), configured=configured, leaving=leaving)
        actual.scale = known
        self._actual = actual
        self._effects = effects
        self._events = events
        self._changed = asyncio.Event()
        self.launchers: Counter[str] = Counter()
        """Who watches the targets, and starts servers."""

    @property
    def _state(self) -> ScaleState:
        assert self._actual.scale is not None, "set when this was made"
        return self._actual.scale

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._state.version

    @property
    def targets(self) -> Mapping[str, int]:
        """By role."""
        return self._state.targets

    def request(self, request: admin_pb2.SetScaleRequest) -> None:
        """Set one role's target.

        Raises:
            RefusedError: INVALID_ARGUMENT; ABORTED where the target has changed since it was looked at; or
                FAILED_PRECONDITION where servers would have to leave: they are drained instead.
        """
        role = ROLE_NAMES.get(request.role, "")
        if role not in ROLES:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "role: give attention, expert or both")
        if request.target > MAX_SERVERS:
            text = f"target: {request.target} {role} servers are more than {MAX_SERVERS}"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, text)
        if request.version != self.version:
            text = (
                f"version: somebody changed the scale: it has version {self.version} now, with a target of "
                f"{self.targets[role]} {role} servers; {request.version} was to be changed: look again"
            )
            raise RefusedError(grpc.StatusCode.ABORTED, text)
        there = len(self.servers(role))
        if request.target < min(there, self.targets[role]):
            text = f"target: {there} {role} servers are there: drain those that should leave, and it follows"
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, text)
        self.set(role, request.target, "an administrator")

    def set(self, role: str, target: int, by: str) -> None:
        """Change one role's target, which is news even if it is the same number."""
        before = self.targets[role]
        self._replace(replace(self._state, version=self.version + 1, targets={**self.targets, role: target}))
        self._events.add("scale_target", role, f"{before} → {target} servers, by {by}")

    def servers(self, role: str) -> list[Member]:
        """That are there and stay."""
        return [member for member in self._actual.staying() if member.role_name == role]

    def leaves(self, member: Member, by: str) -> None:
        """It is asked to drain: where it counts among those that there should be, there should be one less."""
        if self._actual.was_asked_to_leave(member):
            return
        role, there = member.role_name, len(self.servers(member.role_name))
        self._replace(self._state.with_leaving(member.incarnation))
        if role in ROLES and there <= self.targets[role]:
            self.set(role, max(self.targets[role] - 1, 0), by)

    def describe(self) -> admin_pb2.Scale:
        """The targets, and what is there of them; roles that are neither wanted nor there are left out."""
        scale = admin_pb2.Scale(version=self.version)
        actual = self._actual
        for role, target in self.targets.items():
            servers = self.servers(role)
            serving = [m for m in servers if actual.phase is Phase.SERVING and actual.is_in_view(m)]
            if target or servers:
                scale.roles.add(role=ROLES[role], target=target, servers=len(servers), serving=len(serving))
        return scale

    async def wait_beyond(self, version: int) -> None:
        """Until the targets have a greater version."""
        while self.version <= version:
            await self._changed.wait()

    def _replace(self, state: ScaleState) -> None:
        self._actual.scale = state
        self._effects.save(self._actual.durable())
        self._changed.set()
        self._changed = asyncio.Event()
