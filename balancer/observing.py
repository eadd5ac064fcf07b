"""What metrics and traces tell of the control plane: view changes, failures, migrations.

A view change, a failure and a migration are each a trace of their own. Its traceparent travels with the view or the
plan: ranks add what they did, and the requests that it touched link to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode

from expertmesh.balancer.events import Event
from expertmesh.mesh.telemetry import Telemetry, record_span, traceparent_of
from expertmesh.v1 import mesh_pb2

_MEMBER_EVENTS = {
    "server_joined": "joined",
    "server_returned": "returned",
    "server_left": "left",
    "server_lost": "lost",
    "server_fenced": "fenced",
    "server_refused": "refused",
}
_FAILURES = frozenset({"server_lost", "server_fenced", "view_broken"})
_MIGRATIONS_KEPT = 1024
"""More than run at a time: an end that never comes must not keep its span for ever."""


class ControlObserver:
    """Belongs to the event loop.

    Args:
        clock: monotonic seconds.
        wall_ns: nanoseconds since 1970.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = telemetry.tracer
        self._metrics = telemetry.metrics
        self._clock = clock
        self._wall_ns = wall_ns
        self._members: Collection[str] = ()  # of the view published last
        self._failure: Span | None = None
        self._failed_s = 0.0
        self._view_change: Span | None = None
        self._published_s: float | None = None  # while the view does not serve yet
        self._migrations: dict[int, Span] = {}

    # -- views and failures -----------------------------------------------------------------------------------------

    def view_published(self, view: mesh_pb2.View, reason: str) -> str:
        """Returns the traceparent of its trace: that of the failure which it answers, or one of its own."""
        self._metrics.view_changes.add(reason=reason)
        self._members = frozenset(rank.server_id for rank in view.ranks)
        self._published_s = self._clock()
        self._end_view_change(f"view {view.number} came before it served")
        parent = trace.set_span_in_context(self._failure) if self._failure is not None else None
        self._view_change = self._tracer.start_span(
            "view_change",
            context=parent,
            attributes={
                "expertmesh.view": view.number,
                "expertmesh.view.reason": reason,
                "expertmesh.view.servers": sorted(self._members),
            },
        )
        return traceparent_of(self._view_change)

    def heard(self, event: Event) -> None:
        """Of each event of the balancer's log."""
        if event.kind in _MEMBER_EVENTS:
            # Who is refused is not in the mesh, and may call itself what it likes: no series for each name.
            member = "" if event.kind == "server_refused" else event.subject
            self._metrics.balancer_member_events.add(1, member=member, event=_MEMBER_EVENTS[event.kind])
        if event.kind in _FAILURES:
            self._on_failure(event)
        elif event.kind in ("view_serving", "view_adopted"):
            self._on_serving()
        elif event.kind == "paused":
            self._end_view_change(event.message)
            if self._failure is not None:
                self._failure.add_event("paused", {"expertmesh.reason": event.message})

    def _on_failure(self, event: Event) -> None:
        attributes = {"expertmesh.subject": event.subject, "expertmesh.reason": event.message}
        if self._failure is not None:
            self._failure.add_event(event.kind, attributes)
            return
        span = self._tracer.start_span("failure", attributes={"expertmesh.failure": event.kind, **attributes})
        span.set_status(Status(StatusCode.ERROR, f"{event.subject}: {event.message}"))
        if event.kind == "view_broken" or event.subject in self._members:
            self._failure, self._failed_s = span, self._clock()
        else:  # a router: nothing has to be put right
            span.end()

    def _on_serving(self) -> None:
        now = self._clock()
        if self._published_s is not None:
            self._metrics.balancer_view_change_duration_seconds.observe(
                now - self._published_s, traceparent=_of(self._view_change)
            )
        self._published_s = None
        self._end_view_change("")
        if self._failure is not None:
            self._metrics.balancer_interruption_seconds.observe(now - self._failed_s, traceparent=_of(self._failure))
            self._failure.end()
            self._failure = None

    def _end_view_change(self, error: str) -> None:
        span, self._view_change = self._view_change, None
        if span is not None:
            if error:
                span.set_status(Status(StatusCode.ERROR, error))
            span.end()

    # -- migrations -------------------------------------------------------------------------------------------------

    def migration_planned(self, plan: mesh_pb2.MigrationPlan, why: str) -> str:
        """Returns the traceparent of its trace."""
        span = self._tracer.start_span(
            "migration",
            attributes={
                "expertmesh.migration": plan.id,
                "expertmesh.migration.why": why,
                "expertmesh.migration.transfers": len(plan.transfers),
                "expertmesh.layer": plan.placement.layer,
                "expertmesh.placement.version": plan.placement.version,
                "expertmesh.view": plan.view_number,
            },
        )
        if span.is_recording():
            while len(self._migrations) >= _MIGRATIONS_KEPT:
                self._migrations.pop(next(iter(self._migrations))).end()
            self._migrations[plan.id] = span
        return traceparent_of(span)

    def migration_stage(self, plan_id: int, stage: str, seconds: float) -> None:
        """It was in this stage for so long, until now."""
        span = self._migrations.get(plan_id)
        self._metrics.balancer_migration_stage_seconds.observe(seconds, stage=stage, traceparent=_of(span))
        if span is not None:
            now_ns = self._wall_ns()
            parent = trace.set_span_in_context(span)
            record_span(self._tracer, f"migration {stage}", parent, now_ns - int(seconds * 1e9), now_ns)

    def migration_ended(self, plan_id: int, outcome: str, reason: str) -> None:
        self._metrics.balancer_migrations.add(outcome=outcome)
        span = self._migrations.pop(plan_id, None)
        if span is not None:
            span.set_attribute("expertmesh.migration.outcome", outcome)
            if outcome != "committed":
                span.set_status(Status(StatusCode.ERROR, reason))
            span.end()

    def close(self) -> None:
        """The turn is over: what is under way goes on without this balancer, untold."""
        self._end_view_change("the balancer stopped")
        for span in (self._failure, *self._migrations.values()):
            if span is not None:
                span.end()
        self._failure = None
        self._migrations.clear()


def _of(span: Span | None) -> str:
    """For exemplars, which point to spans that are kept."""
    return traceparent_of(span) if span is not None and span.is_recording() else ""
