"""What ``support.balancer_world`` is made of: configuration, registrations, recorded effects, servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from expertmesh.balancer.evaluation import Job
from expertmesh.balancer.state import DurableState
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.v1 import mesh_pb2


def config(attention: int = 1, experts: int = 2, **balancer: Any) -> MeshConfig:
    return parse_config(
        {
            "attention": {"servers": attention},
            "expert": {"servers": experts},
            "balancer": {"mode": "static", **balancer},
        }
    )


def registration(server_id: str, *, incarnation: str = "1", **fields: Any) -> mesh_pb2.Registration:
    """The role is the first letter of the id: a1, e1, b1, r1."""
    role = {
        "a": mesh_pb2.ROLE_ATTENTION,
        "e": mesh_pb2.ROLE_EXPERT,
        "b": mesh_pb2.ROLE_BOTH,
        "r": mesh_pb2.ROLE_ROUTER,
    }[server_id[0]]
    made = mesh_pb2.Registration(
        server_id=server_id,
        incarnation=f"{server_id}#{incarnation}",
        role=role,
        node="n0",
        pid=1,
        grpc_address="127.0.0.1:1",
        rank_address="127.0.0.1:2",
        num_slots=8 if server_id[0] in "eb" else 0,
        fingerprint="f",
        model=mesh_pb2.ModelShape(name="m", family="f", num_experts=8, moe_layers=[0, 2], bytes_per_expert=1),
    )
    made.MergeFrom(mesh_pb2.Registration(**fields))
    return made


@dataclass
class RecordedEffects:
    sent: dict[int, list[mesh_pb2.JoinResponse]] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    saved: list[DurableState] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    secrets: int = 0
    jobs: list[Job] = field(default_factory=list)  # not answered yet
    job_sizes: list[int] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def send(self, session: int, message: mesh_pb2.JoinResponse) -> None:
        self.sent.setdefault(session, []).append(message)

    def close(self, session: int) -> None:
        self.closed.add(session)

    def save(self, state: DurableState) -> None:
        self.saved.append(state)

    def new_secret(self) -> bytes:
        self.secrets += 1
        return f"secret-{self.secrets}".encode()

    def view_published(self, view: mesh_pb2.View, reason: str) -> str:
        self.published.append(reason)
        return f"view {view.number}"

    def evaluate(self, job: Job) -> None:
        self.jobs.append(job)
        self.job_sizes.append(len(job.layers))

    def migration_planned(self, plan: mesh_pb2.MigrationPlan, why: str) -> str:
        assert plan.id, "it was issued"
        return f"migration {plan.id}"

    def migration_stage(self, plan_id: int, stage: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(stage)

    def migration_ended(self, plan_id: int, outcome: str, reason: str) -> None:
        self.outcomes.append(outcome)


@dataclass
class FakeServer:
    """A server on one stream. ``hung`` ones send no heartbeats.

    Of migrations: ``slow`` ones stage nothing, ``broken`` ones fail to, ``deaf`` ones do not hear of commits.
    """

    registration: mesh_pb2.Registration
    session: int
    connected: bool = True
    hung: bool = False
    lazy: bool = False  # never ready
    ready: int = 0
    slow: bool = False
    broken: bool = False
    deaf: bool = False
    load: mesh_pb2.ServerLoad | None = None  # that its heartbeats carry
    num_heard: int = 0  # messages of the session that were read
    running: mesh_pb2.View = field(default_factory=mesh_pb2.View)  # with the placement that it steps with
    staged: dict[int, mesh_pb2.MigrationPlan] = field(default_factory=dict)
    commits: set[int] = field(default_factory=set)
    unsent: list[mesh_pb2.MigrationStatus] = field(default_factory=list)  # while it was disconnected
