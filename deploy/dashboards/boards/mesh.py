"""Steps, ranks, views, and how evenly the experts' load is spread."""

from __future__ import annotations

from panels import MODEL, STEPS, Board, Panel, Query, Row, mean, quantiles, rate


def _split(part: str, role: str) -> Query:
    """The mean seconds of a step that a part of it takes, on the ranks of a role."""
    labels = f'role="{role}"'
    seconds, steps = rate(f"expertmesh_{part}_duration_seconds_sum", labels), rate(STEPS, labels)
    return Query(f"{seconds} / {steps}", part.replace("_", " "))


MESH = Board(
    uid="expertmesh-mesh",
    title="expertmesh: mesh and experts",
    description="Steps, ranks, views, and how evenly the experts' load is spread.",
    rows=[
        Row(
            title="Steps",
            panels=[
                Panel(title="Step", unit="s", queries=quantiles("expertmesh_step_duration_seconds")),
                Panel(
                    title="Where a step of an attention rank goes, mean",
                    unit="s",
                    stacked=True,
                    queries=[_split(part, "attention") for part in ("attention_compute", "dispatch", "combine")],
                ),
                Panel(
                    title="Where a step of an expert rank goes, mean",
                    unit="s",
                    stacked=True,
                    queries=[_split(part, "expert") for part in ("dispatch", "expert_compute", "combine")],
                ),
                Panel(
                    title="Waiting for the other ranks before a step, mean",
                    unit="s",
                    queries=[Query(mean("expertmesh_header_wait_seconds", by="server_id"), "{{server_id}}")],
                ),
                Panel(
                    title="Steps, and tokens in them",
                    queries=[
                        Query(rate("expertmesh_step_duration_seconds_count", by="server_id"), "{{server_id}} steps/s"),
                        Query(mean("expertmesh_step_tokens"), "tokens in a step"),
                        Query(mean("vllm:iteration_tokens_total", MODEL), "tokens of a server in a step"),
                    ],
                ),
            ],
        ),
        Row(
            title="Experts",
            panels=[
                Panel(
                    title="Rows computed by rank",
                    unit="rowsps",
                    queries=[Query(rate("expertmesh_expert_rank_tokens_total", by="server_id"), "{{server_id}}")],
                ),
                Panel(
                    title="Load by rank / mean",
                    description="Over all layers, decayed, under the placement in force; 1 everywhere is perfect.",
                    queries=[Query("expertmesh_balancer_rank_load", "{{expert_server}}")],
                ),
                Panel(
                    title="Balancedness",
                    unit="percentunit",
                    description="Mean rank load / max rank load of a layer.",
                    queries=[Query("expertmesh_balancer_balancedness", "{{over}} over the layers")],
                ),
                Panel(
                    title="Fan-out: expert ranks a token visits in a layer",
                    queries=[Query("expertmesh_balancer_fanout_ranks", "{{over}}")],
                ),
                Panel(
                    title="Fan-out: nodes a token visits in a layer",
                    queries=[Query("expertmesh_balancer_fanout_nodes", "{{over}}")],
                ),
                Panel(
                    title="Weights read from the checkpoint",
                    unit="Bps",
                    queries=[
                        Query(
                            rate("expertmesh_checkpoint_read_bytes_total", by="server_id"), "{{server_id}} checkpoint"
                        )
                    ],
                ),
            ],
        ),
        Row(
            title="Views and failures",
            panels=[
                Panel(
                    title="View",
                    description="Ranks that differ from the balancer are on their way into another one.",
                    queries=[Query("expertmesh_view_number", "{{server_id}}")],
                ),
                Panel(
                    title="Servers by state",
                    stacked=True,
                    queries=[
                        Query("sum by (state) (expertmesh_server_states)", "{{state}}"),
                        Query("expertmesh_balancer_servers_missing", "{{server_role}} missing"),
                    ],
                ),
                Panel(
                    title="View changes in an hour",
                    queries=[Query("sum by (reason) (increase(expertmesh_view_changes_total[1h]))", "{{reason}}")],
                ),
                Panel(
                    title="What happened to servers in an hour",
                    queries=[
                        Query(
                            "sum by (member, event) (increase(expertmesh_balancer_member_events_total[1h]))",
                            "{{member}} {{event}}",
                        )
                    ],
                ),
                Panel(
                    title="Time of a view change, mean of an hour",
                    unit="s",
                    queries=[
                        Query(
                            "sum(increase(expertmesh_balancer_view_change_duration_seconds_sum[1h]))"
                            " / sum(increase(expertmesh_balancer_view_change_duration_seconds_count[1h]))",
                            "published until it serves",
                        ),
                        Query("sum(increase(expertmesh_balancer_interruption_seconds_sum[1h]))", "interrupted, in all"),
                    ],
                ),
                Panel(
                    title="Unforeseen errors",
                    queries=[
                        Query(
                            "sum(increase(expertmesh_rpc_internal_errors_total[1h])) or vector(0)",
                            "INTERNAL in an hour",
                        )
                    ],
                ),
            ],
        ),
    ],
)
