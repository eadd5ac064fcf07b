"""What the reconcile loop does to the world: one wrapper, which tests replace."""

from __future__ import annotations

from typing import Protocol

from expertmesh.balancer.evaluation import Job
from expertmesh.balancer.state import DurableState
from expertmesh.v1 import mesh_pb2


class Effects(Protocol):
    """Everything that the reconciler does to the world. ``session`` is the stream that a member is on."""

    def send(self, session: int, message: mesh_pb2.JoinResponse) -> None: ...

    def close(self, session: int) -> None:
        """End the stream after what was sent on it."""

    def save(self, state: DurableState) -> None: ...

    def new_secret(self) -> bytes: ...

    def view_published(self, view: mesh_pb2.View, reason: str) -> str:
        """Of metrics and traces: formation, join, leave, death or broken. Returns the view's ``traceparent``."""

    def evaluate(self, job: Job) -> None:
        """Ask the policy on a worker thread; the answer comes to ``Online.answered``."""

    def migration_planned(self, plan: mesh_pb2.MigrationPlan, why: str) -> str:
        """Of traces. Returns the plan's ``traceparent``."""

    def migration_stage(self, plan_id: int, stage: str, seconds: float) -> None:
        """Of metrics and traces: a migration was in this stage for so long."""

    def migration_ended(self, plan_id: int, outcome: str, reason: str) -> None:
        """Of metrics and traces: committed, aborted or dropped."""
