"""One migration: a layer on its way to a new placement, how far it is and how it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from expertmesh.v1 import mesh_pb2


class Stage(enum.StrEnum):
    PLANNED = "planned"  # nobody knows of it yet
    STAGING = "staging"  # ranks load beside what they serve with
    COMMITTING = "committing"  # every rank has staged and hears that it may switch


class Outcome(enum.StrEnum):
    COMMITTED = "committed"
    ABORTED = "aborted"  # failed or late: nothing has changed
    DROPPED = "dropped"  # its view is over


@dataclass(kw_only=True)
class Migration:
    """One layer on its way to a new placement. Times are seconds of the balancer's monotonic clock."""

    plan: mesh_pb2.MigrationPlan
    ranks: frozenset[str]  # server ids: each has to stage and to commit
    started_s: float
    stage_s: float  # when the stage began
    num_bytes: int
    stage: Stage = Stage.PLANNED
    staged: set[str] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)
    failure: str = ""
    from_checkpoint: int = 0
    step: int = 0  # of the switch
    told: dict[str, tuple[int, Stage]] = field(default_factory=dict)  # server id → on which stream, how far

    @property
    def layer(self) -> int:
        return self.plan.placement.layer

    @property
    def subject(self) -> str:
        return f"layer {self.layer}"

    @property
    def num_loads(self) -> int:
        return len(self.plan.transfers)

    @property
    def ranks_done(self) -> int:
        return len(self.committed if self.stage is Stage.COMMITTING else self.staged)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a migration ended, for whoever wanted it."""

    layer: int
    outcome: Outcome
    reason: str
