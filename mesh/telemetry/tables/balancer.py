"""What the balancer knows: members and views, migrations, the placement as traffic finds it."""

from __future__ import annotations

from expertmesh.mesh.telemetry.instruments import Counter, Gauge, Histogram
from expertmesh.mesh.telemetry.tables.declared import (
    BALANCER,
    RANKS,
    STEP_BUCKETS_S,
    Declared,
    Table,
)


class BalancerTable(Table):
    # Membership.
    balancer_leader = Declared(
        Gauge, "expertmesh_balancer_leader", "1 while this balancer leads, 0 while it stands by.", starts_on=BALANCER
    )
    view_number = Declared(
        Gauge, "expertmesh_view_number", "The current view; 0 = none.", starts_on=(*RANKS, *BALANCER)
    )
    view_changes = Declared(
        Counter,
        "expertmesh_view_changes",
        "Views published by the balancer.",
        labels=("reason",),
        starts_on=BALANCER,
        series=(("formation",), ("join",), ("leave",), ("death",), ("broken",)),
    )
    balancer_view_change_duration_seconds = Declared(
        Histogram,
        "expertmesh_balancer_view_change_duration_seconds",
        "From the publication of a view until it serves.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=BALANCER,
    )
    balancer_interruption_seconds = Declared(
        Histogram,
        "expertmesh_balancer_interruption_seconds",
        "From the first sign of a failure in the view until a view serves.",
        buckets=(*STEP_BUCKETS_S, 10.0, 20.0, 50.0, 100.0),
        unit="s",
        starts_on=BALANCER,
    )
    balancer_member_events = Declared(
        Counter,
        "expertmesh_balancer_member_events",
        "What happened to a server: joined, returned, left, lost, fenced; refused (of no member).",
        labels=("member", "event"),
    )
    server_states = Declared(Gauge, "expertmesh_server_states", "Servers by state.", labels=("state",))
    balancer_servers_missing = Declared(
        Gauge,
        "expertmesh_balancer_servers_missing",
        "Servers of a role that the scale asks for and that are not there.",
        labels=("server_role",),
    )
    reconcile_duration_seconds = Declared(
        Histogram,
        "expertmesh_reconcile_duration_seconds",
        "One tick of the balancer's loop.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=BALANCER,
    )

    # Migration, as the balancer sees it.
    balancer_migrations = Declared(
        Counter,
        "expertmesh_balancer_migrations",
        "Layer migrations that ended: committed, aborted, dropped.",
        labels=("outcome",),
        starts_on=BALANCER,
        series=(("committed",), ("aborted",), ("dropped",)),
    )
    balancer_migrations_running = Declared(
        Gauge,
        "expertmesh_balancer_migrations_running",
        "Layer migrations by stage: planned, staging, committing.",
        labels=("stage",),
        starts_on=BALANCER,
        series=(("planned",), ("staging",), ("committing",)),
    )
    balancer_migration_oldest_seconds = Declared(
        Gauge,
        "expertmesh_balancer_migration_oldest_seconds",
        "Age of the layer migration that has been under way for longest; 0 = there is none.",
        unit="s",
        starts_on=BALANCER,
    )
    balancer_migration_stage_seconds = Declared(
        Histogram,
        "expertmesh_balancer_migration_stage_seconds",
        "How long a layer migration was in each stage.",
        labels=("stage",),
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=BALANCER,
        series=(("planned",), ("staging",), ("committing",)),
    )
    balancer_evaluation_duration_seconds = Declared(
        Histogram,
        "expertmesh_balancer_evaluation_duration_seconds",
        "Searching better placements for a few layers, on a thread of its own.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=BALANCER,
    )

    # The placement, as traffic finds it. Aggregates over the MoE layers (over="mean", "min", "max"): a model has too
    # many for a series each; `expertmesh balancer loads` shows every one.
    balancer_balancedness = Declared(
        Gauge,
        "expertmesh_balancer_balancedness",
        "Mean rank load / max rank load of a layer, under the placement in force; 1 is perfect.",
        labels=("over",),
    )
    balancer_fanout_ranks = Declared(
        Gauge,
        "expertmesh_balancer_fanout_ranks",
        "Distinct expert ranks that a token visits in a layer, counted since the layer got its placement.",
        labels=("over",),
    )
    balancer_fanout_nodes = Declared(
        Gauge,
        "expertmesh_balancer_fanout_nodes",
        "Distinct nodes that a token visits in a layer, counted since the layer got its placement.",
        labels=("over",),
    )
    balancer_rank_load = Declared(
        Gauge,
        "expertmesh_balancer_rank_load",
        "Load of an expert rank over all layers / mean load of an expert rank; 1 for all is perfect.",
        labels=("expert_server",),
    )
