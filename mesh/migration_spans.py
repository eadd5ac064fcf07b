"""The part of a migration's trace that one rank has."""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.trace import Tracer

from expertmesh.mesh.migration_book import Migration
from expertmesh.mesh.telemetry import context_from_traceparent, is_sampled, record_span


def record_migration(tracer: Tracer, rank: int, migration: Migration) -> None:
    """What this rank did, as a part of the migration's trace, which the balancer began."""
    traceparent = migration.plan.traceparent
    if not is_sampled(traceparent):
        return
    span = record_span(
        tracer,
        "rank migration",
        context_from_traceparent(traceparent),
        migration.received_ns,
        migration.switched_ns or time.time_ns(),
        {
            "expertmesh.migration": migration.id,
            "expertmesh.layer": migration.layer,
            "expertmesh.placement.version": migration.plan.placement.version,
            "expertmesh.rank": rank,
            "expertmesh.migration.slots": len(migration.came_from),
            "expertmesh.migration.sources": migration.came_from,
            "expertmesh.migration.outcome": migration.outcome,
        },
    )
    parent = trace.set_span_in_context(span)
    if migration.staged_ns:
        record_span(tracer, "stage", parent, migration.received_ns, migration.staged_ns)
    if migration.switched_ns:
        began_ns = migration.switched_ns - int(migration.switch_seconds * 1e9)
        record_span(tracer, "switch", parent, began_ns, migration.switched_ns)
