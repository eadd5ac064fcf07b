"""Requests on attention servers, under vLLM's names where it has one."""

from __future__ import annotations

from expertmesh.mesh.telemetry.instruments import Counter, Gauge, Histogram
from expertmesh.mesh.telemetry.tables.declared import (
    ATTENTION,
    REQUEST_BUCKETS_S,
    REQUEST_TOKEN_BUCKETS,
    ROUTER,
    STEP_BUCKETS_S,
    TOKEN_BUCKETS_S,
    TOKEN_COUNT_BUCKETS,
    TTFT_BUCKETS_S,
    Declared,
    Table,
)


class RequestTable(Table):
    """Recorded by attention servers; the router records its own view of the durations (with role="router"), which
    includes queueing, replays and the stream to the client.
    """

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
