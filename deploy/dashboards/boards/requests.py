"""Whether requests meet their objectives, and where their time goes."""

from __future__ import annotations

from panels import MODEL, ROUTER, Board, Panel, Query, Row, mean, quantile, quantiles, rate

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
