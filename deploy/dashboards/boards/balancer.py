"""Placement, migrations and the balancer's own loop."""

from __future__ import annotations

from panels import Board, Panel, Query, Row, mean, quantile, rate

BALANCER = Board(
    uid="expertmesh-balancer",
    title="expertmesh: balancer",
    description="Placement, migrations and the balancer's own loop.",
    rows=[
        Row(
            title="Migrations",
            panels=[
                Panel(
                    title="Ended in five minutes",
                    queries=[
                        Query("sum by (outcome) (increase(expertmesh_balancer_migrations_total[5m]))", "{{outcome}}")
                    ],
                ),
                Panel(
                    title="Under way, by stage",
                    stacked=True,
                    queries=[Query("sum by (stage) (expertmesh_balancer_migrations_running)", "{{stage}}")],
                ),
                Panel(
                    title="Age of the oldest",
                    unit="s",
                    queries=[Query("max(expertmesh_balancer_migration_oldest_seconds)", "oldest")],
                ),
                Panel(
                    title="Time in each stage, mean",
                    unit="s",
                    stacked=True,
                    queries=[Query(mean("expertmesh_balancer_migration_stage_seconds", by="stage"), "{{stage}}")],
                ),
                Panel(
                    title="On a rank: stage in the background, switch between two steps, p99",
                    unit="s",
                    queries=[
                        Query(quantile(0.99, "expertmesh_rank_migration_duration_seconds", by="phase"), "{{phase}}")
                    ],
                ),
                Panel(
                    title="Weights moved",
                    unit="Bps",
                    queries=[Query(rate("expertmesh_migrated_bytes_total", by="server_id"), "to {{server_id}}")],
                ),
                Panel(
                    title="Slots switched, by where their weights came from",
                    queries=[Query("sum by (source) (increase(expertmesh_migrated_slots_total[5m]))", "{{source}}")],
                ),
                Panel(
                    title="Weights from the checkpoint instead of a peer",
                    queries=[Query("sum by (cause) (increase(expertmesh_migration_fallbacks_total[1h]))", "{{cause}}")],
                ),
                Panel(
                    title="Plans that ended on ranks",
                    queries=[Query("sum by (outcome) (increase(expertmesh_rank_migrations_total[5m]))", "{{outcome}}")],
                ),
            ],
        ),
        Row(
            title="The balancer",
            panels=[
                Panel(
                    title="Leader",
                    queries=[Query("expertmesh_balancer_leader", "{{server_id}}")],
                ),
                Panel(
                    title="A tick of its loop, p99",
                    unit="s",
                    queries=[Query(quantile(0.99, "expertmesh_reconcile_duration_seconds"), "tick")],
                ),
                Panel(
                    title="Searches for better placements",
                    unit="s",
                    description="Seconds of search in a second; mode online.",
                    queries=[Query(rate("expertmesh_balancer_evaluation_duration_seconds_sum"), "searching")],
                ),
                Panel(
                    title="Versions",
                    queries=[Query("count by (version) (expertmesh_build_info)", "{{version}}")],
                ),
            ],
        ),
    ],
)
