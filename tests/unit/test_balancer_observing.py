"""The control plane's own traces: view changes, failures and migrations."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from expertmesh.balancer.events import Event
from expertmesh.balancer.observing import ControlObserver
from expertmesh.mesh.telemetry import Metrics, Telemetry
from expertmesh.v1 import mesh_pb2


class Stand:
    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.metrics = Metrics(role="balancer")
        telemetry = Telemetry(provider.get_tracer("test"), self.metrics, tracing=True)
        self.now = 100.0
        self.observer = ControlObserver(telemetry, lambda: self.now, lambda: int(self.now * 1e9))

    def hear(self, kind: str, subject: str = "", message: str = "why") -> None:
        self.observer.heard(Event(number=1, unix_s=self.now, kind=kind, subject=subject, message=message))

    def publish(self, number: int, reason: str) -> str:
        ranks = [mesh_pb2.Rank(server_id="expert-0"), mesh_pb2.Rank(server_id="attention-0")]
        return self.observer.view_published(mesh_pb2.View(number=number, ranks=ranks), reason)

    def finished(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name == name]


@pytest.fixture
def stand() -> Stand:
    return Stand()


def traceparent_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


def test_a_failure_is_a_trace_that_ends_when_a_view_serves(stand: Stand) -> None:
    stand.publish(1, "formation")
    stand.hear("view_serving")
    stand.hear("view_broken", "attention-0")
    stand.now += 0.5
    stand.hear("server_lost", "expert-0")
    traceparent = stand.publish(2, "death")
    stand.now += 1.5
    stand.hear("view_serving")
    formation, death = stand.finished("view_change")
    (failure,) = stand.finished("failure")
    assert formation.parent is None
    assert death.parent == failure.context
    assert traceparent_of(death) == traceparent
    assert [event.name for event in failure.events] == ["server_lost"]
    assert failure.status.status_code is StatusCode.ERROR
    assert stand.metrics.balancer_interruption_seconds.labels().read().sum == pytest.approx(2.0)
    assert stand.metrics.balancer_view_change_duration_seconds.labels().read().sum == pytest.approx(1.5)
    assert stand.metrics.balancer_member_events.labels(member="expert-0", event="lost").read() == 1


def test_refused_servers_make_no_series_of_their_own(stand: Stand) -> None:
    for name in ("impostor-1", "impostor-2"):
        stand.hear("server_refused", name)
    (series,) = stand.metrics.balancer_member_events.series()
    assert series[0] == {"member": "", "event": "refused"}
    assert series[1].read() == 2


def test_a_lost_router_is_a_failure_that_no_view_answers(stand: Stand) -> None:
    stand.publish(1, "formation")
    stand.hear("server_lost", "router-0")
    assert len(stand.finished("failure")) == 1


def test_a_view_that_another_one_overtakes_says_so(stand: Stand) -> None:
    stand.publish(1, "formation")
    stand.publish(2, "join")
    (first,) = stand.finished("view_change")
    assert (first.status.status_code, first.status.description) == (
        StatusCode.ERROR,
        "view 2 came before it served",
    )


@pytest.mark.parametrize(("outcome", "status"), [("committed", StatusCode.UNSET), ("aborted", StatusCode.ERROR)])
def test_a_migration_has_its_stages(stand: Stand, outcome: str, status: StatusCode) -> None:
    plan = mesh_pb2.MigrationPlan(id=7, view_number=1, placement=mesh_pb2.LayerPlacement(layer=3, version=2))
    traceparent = stand.observer.migration_planned(plan, "it gains")
    stand.now += 4.0
    stand.observer.migration_stage(7, "staging", 4.0)
    stand.observer.migration_ended(7, outcome, "late")
    stand.observer.migration_ended(7, outcome, "late")
    (migration,), (staging,) = stand.finished("migration"), stand.finished("migration staging")
    assert traceparent_of(migration) == traceparent
    assert staging.parent == migration.context
    assert (staging.start_time, staging.end_time) == (100_000_000_000, 104_000_000_000)
    assert migration.status.status_code is status
    assert (migration.attributes or {})["expertmesh.migration.outcome"] == outcome
