"""Every metric of the mesh, declared once.

Names and buckets under ``vllm:`` are vLLM's (vllm/v1/metrics/loggers.py), so that its dashboards work; OpenTelemetry
names are those of the GenAI semantic conventions where they have one. ``starts_on`` lists the roles on which a metric
is exported as 0 from the start, with labels for each of ``series``: a rate over a counter that appears with its first
value misses that value. Recorded elsewhere it appears with its first value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from expertmesh.mesh.telemetry.instruments import NULL, Counter, Family, Gauge, Histogram

FamilyT = TypeVar("FamilyT", Gauge, Counter, Histogram)

ATTENTION = ("attention", "both")
EXPERT = ("expert", "both")
RANKS = ("attention", "expert", "both")
ROUTER = ("router",)
BALANCER = ("balancer",)

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
# vLLM's begin at 10 ms; a small model's tokens are faster.
TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
# vLLM's begin at 0.3 s.
REQUEST_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_BUCKETS_S = tuple(mantissa * 10.0**exponent for exponent in range(-5, 1) for mantissa in (1, 2, 5))
REQUEST_TOKEN_BUCKETS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))
TOKEN_COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Declared(Generic[FamilyT]):
    """A row of the table: as a class attribute of ``Metrics`` it becomes the instance's instrument."""

    def __init__(
        self,
        kind: type[FamilyT],
        name: str,
        help: str,  # noqa: A002  # Prometheus's word
        *,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = (),
        unit: str = "1",
        otel: str = "",
        starts_on: Sequence[str] = (),
        series: Sequence[Sequence[str]] = (),
    ) -> None:
        self.kind: type[FamilyT] = kind
        self.name = name
        self.help = help
        self.labels = tuple(labels)
        self.buckets = tuple(buckets)
        self.unit = unit
        self.otel = otel or "expertmesh." + name.removeprefix("vllm:").removeprefix("expertmesh_").removesuffix(
            "_seconds"
        )
        self.starts_on = tuple(starts_on)
        self.series = tuple(series) if labels else ((),)

    def __set_name__(self, owner: type[Metrics], attribute: str) -> None:
        self.attribute = attribute

    @overload
    def __get__(self, metrics: None, owner: type[Metrics]) -> Declared[FamilyT]: ...
    @overload
    def __get__(self, metrics: Metrics, owner: type[Metrics]) -> FamilyT: ...
    def __get__(self, metrics: Metrics | None, owner: type[Metrics]) -> Declared[FamilyT] | FamilyT:
        # Reached on the class only: an instance's attribute, set in its constructor, hides a non-data descriptor.
        assert metrics is None, f"{self.attribute} was not made"
        return self


class Metrics:
    """The instruments: ``.set``/``.add`` on gauges, ``.add`` on counters, ``.observe`` on histograms, each with labels
    as keywords; ``.labels(...)`` binds a series once for a hot path. Thread-safe.

    ``constant_labels`` stand on every series; ``model_name`` on those under ``vllm:`` only.
    """

    # Requests, as vLLM names them. Recorded by attention servers; the router records its own view of the durations
    # (with role="router"), which includes queueing, replays and the stream to the client.
    num_requests_running = Declared(Gauge, "vllm:num_requests_running", "Sequences in the batch.", starts_on=ATTENTION)
    num_requests_waiting = Declared(Gauge, "vllm:num_requests_waiting", "Sequences waiting.", starts_on=ATTENTION)
    kv_cache_usage_perc = Declared(
        Gauge, "vllm:kv_cache_usage_perc", "KV blocks in use; 1 means all.", starts_on=ATTENTION
    )
    time_to_first_token_seconds = Declared(
        Histogram,
        "vllm:time_to_first_token_seconds",
        "From arrival to the first token.",
        buckets=TTFT_BUCKETS_S,
        unit="s",
        otel="gen_ai.server.time_to_first_token",
        starts_on=(*ATTENTION, *ROUTER),
    )
    inter_token_latency_seconds = Declared(
        Histogram,
        "vllm:inter_token_latency_seconds",
        "Between one token and the next of a request.",
        buckets=TOKEN_BUCKETS_S,
        unit="s",
        otel="gen_ai.server.time_per_output_token",
        starts_on=(*ATTENTION, *ROUTER),
    )
    e2e_request_latency_seconds = Declared(
        Histogram,
        "vllm:e2e_request_latency_seconds",
        "From arrival to the end of a request.",
        buckets=REQUEST_BUCKETS_S,
        unit="s",
        otel="gen_ai.server.request.duration",
        starts_on=(*ATTENTION, *ROUTER),
    )
    request_queue_time_seconds = Declared(
        Histogram,
        "vllm:request_queue_time_seconds",
        "In the waiting phase.",
        buckets=REQUEST_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    request_prefill_time_seconds = Declared(
        Histogram,
        "vllm:request_prefill_time_seconds",
        "In the prefill phase.",
        buckets=REQUEST_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    request_decode_time_seconds = Declared(
        Histogram,
        "vllm:request_decode_time_seconds",
        "In the decode phase.",
        buckets=REQUEST_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    prompt_tokens = Declared(
        Counter, "vllm:prompt_tokens", "Prefill tokens computed.", unit="{token}", starts_on=ATTENTION
    )
    generation_tokens = Declared(
        Counter, "vllm:generation_tokens", "Tokens generated.", unit="{token}", starts_on=ATTENTION
    )
    request_success = Declared(
        Counter,
        "vllm:request_success",
        "Requests that ended well.",
        labels=("finished_reason",),
        starts_on=ROUTER,
        series=(("stop",), ("length",), ("abort",)),
    )
    request_inference_time_seconds = Declared(
        Histogram,
        "vllm:request_inference_time_seconds",
        "In the prefill and decode phases.",
        buckets=REQUEST_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    request_time_per_output_token_seconds = Declared(
        Histogram,
        "vllm:request_time_per_output_token_seconds",
        "The mean of a request, its first token left out.",
        buckets=TOKEN_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    request_prompt_tokens = Declared(
        Histogram,
        "vllm:request_prompt_tokens",
        "Prompt tokens of a request.",
        buckets=REQUEST_TOKEN_BUCKETS,
        unit="{token}",
        starts_on=ATTENTION,
    )
    request_generation_tokens = Declared(
        Histogram,
        "vllm:request_generation_tokens",
        "Tokens generated for a request.",
        buckets=REQUEST_TOKEN_BUCKETS,
        unit="{token}",
        starts_on=ATTENTION,
    )
    iteration_tokens = Declared(
        Histogram,
        "vllm:iteration_tokens_total",
        "Tokens of this server in a step.",
        buckets=TOKEN_COUNT_BUCKETS,
        unit="{token}",
        starts_on=ATTENTION,
    )
    num_preemptions = Declared(
        Counter, "vllm:num_preemptions", "Sequences that gave their KV blocks to another.", starts_on=ATTENTION
    )
    prefix_cache_queries = Declared(
        Counter,
        "vllm:prefix_cache_queries",
        "Tokens looked up in the prefix cache.",
        unit="{token}",
        starts_on=ATTENTION,
    )
    prefix_cache_hits = Declared(
        Counter, "vllm:prefix_cache_hits", "Tokens found in the prefix cache.", unit="{token}", starts_on=ATTENTION
    )
    kv_handover_blocks = Declared(
        Counter,
        "expertmesh_kv_handover_blocks",
        "KV blocks of prompts that came from the mesh that computed them.",
        unit="{block}",
    )
    kv_handover_seconds = Declared(
        Histogram,
        "expertmesh_kv_handover_seconds",
        "How long the KV blocks of a prompt took to come.",
        buckets=STEP_BUCKETS_S,
        unit="s",
    )
    kv_handover_failures = Declared(
        Counter, "expertmesh_kv_handover_failures", "Prompts whose KV blocks did not come and were computed anew."
    )
    spec_decode_num_drafts = Declared(
        Counter, "vllm:spec_decode_num_drafts", "Drafts verified.", unit="{draft}", starts_on=ATTENTION
    )
    spec_decode_num_draft_tokens = Declared(
        Counter, "vllm:spec_decode_num_draft_tokens", "Tokens drafted.", unit="{token}", starts_on=ATTENTION
    )
    spec_decode_num_accepted_tokens = Declared(
        Counter,
        "vllm:spec_decode_num_accepted_tokens",
        "Drafted tokens that were right.",
        unit="{token}",
        starts_on=ATTENTION,
    )
    spec_decode_acceptance_rate = Declared(
        Gauge, "expertmesh_speculation_acceptance_rate", "Drafted tokens that were right, of all since the start."
    )

    # The step loop of a rank.
    step_duration_seconds = Declared(
        Histogram,
        "expertmesh_step_duration_seconds",
        "A step with work, header to sampled tokens.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    step_tokens = Declared(
        Histogram,
        "expertmesh_step_tokens",
        "Tokens of this rank in a step.",
        buckets=TOKEN_COUNT_BUCKETS,
        unit="{token}",
        starts_on=ATTENTION,
    )
    header_wait_seconds = Declared(
        Histogram,
        "expertmesh_header_wait_seconds",
        "Waiting for the other ranks' headers before a step.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    attention_compute_duration_seconds = Declared(
        Histogram,
        "expertmesh_attention_compute_duration_seconds",
        "Dense work between two exchanges.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=ATTENTION,
    )
    dispatch_duration_seconds = Declared(
        Histogram,
        "expertmesh_dispatch_duration_seconds",
        "The dispatch of one layer.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    expert_compute_duration_seconds = Declared(
        Histogram,
        "expertmesh_expert_compute_duration_seconds",
        "The expert MLPs of one layer.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=EXPERT,
    )
    combine_duration_seconds = Declared(
        Histogram,
        "expertmesh_combine_duration_seconds",
        "The combine of one layer.",
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
    )
    split_steps = Declared(
        Counter, "expertmesh_split_steps", "Steps computed as two micro-batches that take turns.", starts_on=RANKS
    )
    expert_rank_tokens = Declared(
        Counter,
        "expertmesh_expert_rank_tokens",
        "Rows that this rank's experts computed, over all layers.",
        unit="{token}",
        starts_on=EXPERT,
    )
    slots_loaded = Declared(Counter, "expertmesh_slots_loaded", "Slots filled with an expert.", starts_on=EXPERT)
    checkpoint_read_bytes = Declared(
        Counter, "expertmesh_checkpoint_read_bytes", "Weights read from the checkpoint.", unit="By", starts_on=RANKS
    )

    # Migration, as each rank sees it.
    rank_migrations = Declared(
        Counter,
        "expertmesh_rank_migrations",
        "Plans that ended on this rank: committed, aborted, failed, refused, forgotten, superseded, view_ended.",
        labels=("outcome",),
        starts_on=RANKS,
        series=(("committed",), ("aborted",), ("failed",)),
    )
    rank_migration_duration_seconds = Declared(
        Histogram,
        "expertmesh_rank_migration_duration_seconds",
        "Phases of a migration on this rank: stage (in the background), switch (between two steps).",
        labels=("phase",),
        buckets=STEP_BUCKETS_S,
        unit="s",
        starts_on=RANKS,
        series=(("stage",), ("switch",)),
    )
    migrated_slots = Declared(
        Counter,
        "expertmesh_migrated_slots",
        "Slots that were switched to another expert, by where its weights came from: local, peer, checkpoint.",
        labels=("source",),
        starts_on=EXPERT,
        series=(("local",), ("peer",), ("checkpoint",)),
    )
    migrated_bytes = Declared(
        Counter, "expertmesh_migrated_bytes", "Weights that were switched to.", unit="By", starts_on=EXPERT
    )
    migration_fallbacks = Declared(
        Counter,
        "expertmesh_migration_fallbacks",
        "Weights from the checkpoint instead of a peer: called_off, broken, checksum.",
        labels=("cause",),
        starts_on=EXPERT,
        series=(("called_off",), ("broken",), ("checksum",)),
    )

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

    # The router, and what every service has.
    slo_requests = Declared(
        Counter,
        "expertmesh_slo_requests",
        "Requests by whether they met an objective: served (no failure of ours), ttft, tpot, and all of them.",
        labels=("objective", "met"),
        starts_on=ROUTER,
        series=tuple((objective, met) for objective in ("served", "ttft", "tpot", "all") for met in ("true", "false")),
    )
    goodput_tokens = Declared(
        Counter,
        "expertmesh_goodput_tokens",
        "Tokens generated for requests that met all objectives.",
        unit="{token}",
        starts_on=ROUTER,
    )
    router_requests_inflight = Declared(
        Gauge, "expertmesh_router_requests_inflight", "Requests admitted and not finished.", starts_on=ROUTER
    )
    requests_rejected = Declared(
        Counter,
        "expertmesh_requests_rejected",
        "Requests refused.",
        labels=("reason",),
        starts_on=ROUTER,
        series=(("invalid_argument",), ("resource_exhausted",), ("unavailable",), ("deadline_exceeded",)),
    )
    http_requests = Declared(
        Counter,
        "expertmesh_http_requests",
        "Answered by the router's HTTP door, by path and status; 499: the client went away.",
        labels=("route", "code"),
        unit="{request}",
    )
    replays = Declared(
        Counter, "expertmesh_replays", "Requests continued on another attention server.", starts_on=ROUTER
    )
    rpc_internal_errors = Declared(
        Counter,
        "expertmesh_rpc_internal_errors",
        "Calls that ended in INTERNAL by an unforeseen error.",
        labels=("method",),
    )
    build_info = Declared(Gauge, "expertmesh_build_info", "Always 1.", labels=("version", "python"))

    def __init__(
        self,
        *,
        role: str = "",
        constant_labels: Mapping[str, str] | None = None,
        model_name: str = "",
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self._constant_labels = dict(constant_labels or {})
        self._model_name = model_name
        for declared in declarations():
            kind: type[Family[Any]] = declared.kind if enabled else NULL[declared.kind]
            family = kind(declared.name, declared.labels, declared.buckets)
            setattr(self, declared.attribute, family)
            if role in declared.starts_on:
                for values in declared.series:
                    family.labels(**dict(zip(declared.labels, values, strict=True)))

    def families(self) -> Iterator[tuple[Declared[Any], Family[Any], dict[str, str]]]:
        """Each declaration with its family and the labels that all its series share."""
        for declared in declarations():
            shared = dict(self._constant_labels)
            if declared.name.startswith("vllm:"):
                shared["model_name"] = self._model_name
            yield declared, getattr(self, declared.attribute), shared


def declarations() -> Iterator[Declared[Any]]:
    """The table, in order."""
    return (row for row in vars(Metrics).values() if isinstance(row, Declared))
