"""What the dashboards show: each panel is a title, a unit and its queries; ``generate.py`` makes Grafana's JSON of it.

Latencies of requests are those of the router (``role="router"``): the client's view, queueing and replays included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RATE = "$__rate_interval"
STEPS = "expertmesh_step_duration_seconds_count"
MODEL = 'model_name=~"$model"'
ROUTER = f'role="router",{MODEL}'


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the legend of its series."""

    expr: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """``unit`` is Grafana's name of it; ``stacked``: the series add up to something; ``width`` of 24."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    description: str = ""
    stacked: bool = False
    width: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """``uid`` is also the name of its file."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Per second, summed over all series but those of the label ``by``."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({metric}{{{labels}}}[{RATE}]))"


def quantile(share: float, metric: str, labels: str = "", by: str = "") -> str:
    group = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({group}) (rate({metric}_bucket{{{labels}}}[{RATE}])))"


def mean(metric: str, labels: str = "", by: str = "") -> str:
    return f"{rate(metric + '_sum', labels, by)} / {rate(metric + '_count', labels, by)}"


def quantiles(metric: str, labels: str = "") -> list[Query]:
    """p50, p95 and p99, with the traces that they are made of."""
    return [Query(quantile(share, metric, labels), f"p{share * 100:g}", exemplars=True) for share in (0.5, 0.95, 0.99)]


REQUESTS = Board(
    uid="expertmesh-requests",
    title="expertmesh: requests",
    description="Whether requests meet their objectives, and where their time goes.",
    rows=[
        Row(
            title="Objectives",
            panels=[
                Panel(
                    title="Requests that met their objectives",
                    unit="percentunit",
                    description="telemetry.slo_ttft_s and slo_tpot_s; served: not failed by the mesh.",
                    queries=[
                        Query(
                            rate("expertmesh_slo_requests_total", 'met="true"', "objective")
                            + " / "
                            + rate("expertmesh_slo_requests_total", by="objective"),
                            "{{objective}}",
                        )
                    ],
                ),
                Panel(
                    title="Goodput and throughput",
                    unit="tokens/s",
                    description="Goodput: tokens of requests that met all objectives.",
                    queries=[
                        Query(rate("expertmesh_goodput_tokens_total"), "goodput"),
                        Query(rate("vllm:generation_tokens_total", MODEL), "generated"),
                        Query(rate("vllm:prompt_tokens_total", MODEL), "prompts computed"),
                    ],
                ),
                Panel(
                    title="Burn rate of the error budget",
                    description="1 = the budget of a 99 % objective is used up exactly at the end of its period.",
                    queries=[
                        Query("expertmesh:slo_errors:ratio_rate5m / 0.01", "5 min"),
                        Query("expertmesh:slo_errors:ratio_rate1h / 0.01", "1 h"),
                        Query("expertmesh:slo_errors:ratio_rate6h / 0.01", "6 h"),
                    ],
                ),
                Panel(
                    title="Requests by end",
                    unit="reqps",
                    stacked=True,
                    queries=[
                        Query(rate("vllm:request_success_total", MODEL, "finished_reason"), "{{finished_reason}}"),
                        Query(rate("expertmesh_requests_rejected_total", by="reason"), "refused: {{reason}}"),
                    ],
                ),
                Panel(
                    title="Under way",
                    queries=[
                        Query("sum by (server_id) (expertmesh_router_requests_inflight)", "{{server_id}}"),
                        Query(f"sum(vllm:num_requests_running{{{MODEL}}})", "running"),
                        Query(f"sum(vllm:num_requests_waiting{{{MODEL}}})", "waiting"),
                    ],
                ),
                Panel(
                    title="Replays and preemptions",
                    unit="reqps",
                    queries=[
                        Query(rate("expertmesh_replays_total"), "replayed on another attention server"),
                        Query(rate("vllm:num_preemptions_total", MODEL), "preempted for KV blocks"),
                    ],
                ),
            ],
        ),
        Row(
            title="Latency",
            panels=[
                Panel(
                    title="Time to first token",
                    unit="s",
                    queries=quantiles("vllm:time_to_first_token_seconds", ROUTER),
                ),
                Panel(
                    title="Time between tokens",
                    unit="s",
                    queries=quantiles("vllm:inter_token_latency_seconds", ROUTER),
                ),
                Panel(title="Whole request", unit="s", queries=quantiles("vllm:e2e_request_latency_seconds", ROUTER)),
                Panel(
                    title="Phases on attention servers, mean",
                    unit="s",
                    stacked=True,
                    queries=[
                        Query(mean(f"vllm:request_{phase}_time_seconds", MODEL), phase)
                        for phase in ("queue", "prefill", "decode")
                    ],
                ),
                Panel(
                    title="Time per output token of a request, p95",
                    unit="s",
                    queries=[
                        Query(
                            quantile(0.95, "vllm:request_time_per_output_token_seconds", MODEL, "server_id"),
                            "{{server_id}}",
                        )
                    ],
                ),
                Panel(
                    title="Inference time of a request",
                    unit="s",
                    queries=quantiles("vllm:request_inference_time_seconds", MODEL),
                ),
            ],
        ),
        Row(
            title="Work and memory",
            panels=[
                Panel(
                    title="KV cache in use",
                    unit="percentunit",
                    queries=[Query(f"vllm:kv_cache_usage_perc{{{MODEL}}}", "{{server_id}}")],
                ),
                Panel(
                    title="Prefix cache: tokens found",
                    unit="percentunit",
                    queries=[
                        Query(
                            rate("vllm:prefix_cache_hits_total", MODEL)
                            + " / "
                            + rate("vllm:prefix_cache_queries_total", MODEL),
                            "hits",
                        )
                    ],
                ),
                Panel(
                    title="Tokens of a request, mean",
                    queries=[
                        Query(mean("vllm:request_prompt_tokens", MODEL), "prompt"),
                        Query(mean("vllm:request_generation_tokens", MODEL), "generated"),
                    ],
                ),
            ],
        ),
    ],
)


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
                    queries=[Query("sum by (state) (expertmesh_server_states)", "{{state}}")],
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

BOARDS = (REQUESTS, MESH, BALANCER)
