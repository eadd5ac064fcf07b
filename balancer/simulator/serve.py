"""``simulate --serve``: what serving recorded arrivals would be like under each policy's placement."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.arrivals import Arrivals
from expertmesh.balancer.simulator.batching import Limits, Replay, replay
from expertmesh.balancer.simulator.expert_time import Origins, RoutedLayer, measure
from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import ModelShape
from expertmesh.balancer.simulator.policies import Policy, policies
from expertmesh.balancer.simulator.routed import RoutedTrace, route
from expertmesh.balancer.simulator.score import tally
from expertmesh.balancer.simulator.step_time import StepTime
from expertmesh.balancer.simulator.trace import Trace
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh.errors import UserError

Floats = NDArray[np.float64]
POLICIES = ("linear", "eplb", "expertmesh")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """
    Args:
        attention_ranks: ranks of their own for the attention half; None: every rank has both halves.
        max_num_seqs, max_num_batched_tokens: of one attention rank.
        slo_ttft_s, slo_tpot_s: what a request must meet to count as goodput.
        max_layers: layers of the trace that are placed and counted, evenly spaced; they stand for all of the model's.
    """

    shape: ModelShape
    hardware: Hardware = field(default_factory=Hardware)
    attention_ranks: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    slo_ttft_s: float = 2.0
    slo_tpot_s: float = 0.05
    max_layers: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeResult:
    """One policy. Times are milliseconds, percentiles over requests or steps; None where nothing was counted.

    Args:
        requests, refused: all that arrived, and those of them that no KV cache has room for.
        duration_s: from the first arrival to the last token.
        attention_ms, experts_ms, exchange_ms: parts of ``step_ms_mean``; the rest of it is fixed.
        tokens_per_s: output tokens.
        goodput_rps: requests a second that met both objectives; ``slo_share`` of all that arrived.
    """

    policy: str
    model: str
    ranks: int
    attention_ranks: int
    nodes: int
    slots: int
    balancedness_mean: float
    fanout_ranks: float
    fanout_nodes: float
    requests: int
    refused: int
    duration_s: float
    steps: int
    step_ms_mean: float
    step_ms_p50: float
    step_ms_p99: float
    attention_ms: float
    experts_ms: float
    exchange_ms: float
    tokens_per_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float | None
    tpot_ms_p99: float | None
    slo_share: float
    goodput_rps: float
    routing: str
    constants: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def serve(
    trace: Trace, arrivals: Arrivals, topology: Topology, options: ServeOptions, train_fraction: float = 0.5
) -> list[ServeResult]:
    """Every policy's result, placed on the first part of the trace and counted on the rest.

    Raises:
        UserError: the trace is not of this model, the model does not fit the ranks, or no request fits a KV cache.
    """
    _check(trace, topology, options)
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_tokens=kv_tokens(topology, options),
    )
    if (arrivals.prompt_tokens + arrivals.output_tokens).min() > limits.kv_tokens:
        problem = f"every request is longer than the {limits.kv_tokens} tokens of a rank's KV cache"
        raise UserError("--serve", problem, "give more --ranks, so that each holds fewer experts")
    routed = RoutedTrace.of(trace, options.shape.top_k, topology.num_ranks, train_fraction, options.max_layers)
    chosen = [policy for policy in policies(topology, trace.num_experts) if policy.name in POLICIES]
    return [_serve(policy, routed, arrivals, topology, options, limits) for policy in chosen]


def _serve(
    policy: Policy,
    routed: RoutedTrace,
    arrivals: Arrivals,
    topology: Topology,
    options: ServeOptions,
    limits: Limits,
) -> ServeResult:
    layers = route(policy, routed, topology)
    num_attention = options.attention_ranks or topology.num_ranks
    expert_times = measure(
        layers,
        topology,
        origins(topology, options.attention_ranks),
        options.shape,
        options.hardware,
        num_attention * max(options.max_num_batched_tokens, options.max_num_seqs),
    )
    step_time = StepTime(options.shape, options.hardware, expert_times)
    found = replay(arrivals, step_time, limits, num_attention)
    return _result(policy, routed, layers, arrivals, found, topology, options)


def origins(topology: Topology, attention_ranks: int | None) -> Origins:
    """Attention ranks on the expert ranks, or as many of their own on each node."""
    if attention_ranks is None:
        return Origins(node_A=topology.node_R.astype(np.int64), colocated=True)
    node_A = np.arange(attention_ranks) * topology.num_nodes // attention_ranks
    return Origins(node_A=node_A, colocated=False)


def kv_tokens(topology: Topology, options: ServeOptions) -> int:
    """Tokens that the KV cache of one attention rank holds, beside the weights.

    Raises:
        UserError: the weights alone are too much for a rank.
    """
    shape, hardware = options.shape, options.hardware
    room = hardware.memory_gb * 1e9 * hardware.memory_share
    experts = topology.width * shape.num_moe_layers * shape.expert_bytes
    dense = (shape.dense_params + 2 * shape.head_params) * shape.weight_bytes
    here = dense if options.attention_ranks else dense + experts
    free = room - here
    per_token = shape.num_layers * shape.kv_bytes
    if free < per_token or experts > room:
        problem = f"a rank's weights take {max(here, experts) / 1e9:.0f} GB of {room / 1e9:.0f} GB"
        raise UserError("--ranks", problem, "give more --ranks or fewer --slots, so that each rank holds fewer experts")
    return int(free // per_token)


def _check(trace: Trace, topology: Topology, options: ServeOptions) -> None:
    shape = options.shape
    for key, value in (
        ("--attention-ranks", options.attention_ranks),
        ("--max-num-seqs", options.max_num_seqs),
        ("--max-num-batched-tokens", options.max_num_batched_tokens),
        ("--max-layers", options.max_layers),
    ):
        if value is not None and value < 1:
            raise UserError(key, f"{value} is less than 1", "give 1 or more")
    for key, seconds in (("--slo-ttft-ms", options.slo_ttft_s), ("--slo-tpot-ms", options.slo_tpot_s)):
        if not seconds > 0:
            raise UserError(key, f"{seconds * 1e3:g} is not above 0", "give milliseconds")
    if trace.num_experts != shape.num_experts:
        problem = f"{shape.name} has {shape.num_experts} experts a layer, the trace {trace.num_experts}"
        raise UserError("--model", problem, "give the model that the trace is of")
    if trace.topk_LTK is not None and trace.topk_LTK.shape[2] != shape.top_k:
        problem = f"{shape.name} chooses {shape.top_k} experts a token, the trace {trace.topk_LTK.shape[2]}"
        raise UserError("--model", problem, "give the model that the trace is of")
    if options.attention_ranks is not None and options.attention_ranks % topology.num_nodes:
        problem = f"{options.attention_ranks} do not divide over {topology.num_nodes} nodes"
        raise UserError("--attention-ranks", problem, "give as many for each node")


def _result(
    policy: Policy,
    routed: RoutedTrace,
    layers: list[RoutedLayer],
    arrivals: Arrivals,
    found: Replay,
    topology: Topology,
    options: ServeOptions,
) -> ServeResult:
    scores = [tally(layer.rank_TK, topology) for layer in layers]
    served_N = np.isfinite(found.done_s)
    ttft_N = (found.first_s - arrivals.arrival_s)[served_N]
    outputs_N = arrivals.output_tokens[served_N]
    tpot_N = (found.done_s - found.first_s)[served_N] / np.maximum(outputs_N - 1, 1)
    several_N = outputs_N > 1
    good = int(((ttft_N <= options.slo_ttft_s) & (tpot_N <= options.slo_tpot_s)).sum())
    duration_s = float(found.done_s[served_N].max())
    steps = len(found.step_s)
    return ServeResult(
        policy=policy.name,
        model=options.shape.name,
        ranks=topology.num_ranks,
        attention_ranks=options.attention_ranks or topology.num_ranks,
        nodes=topology.num_nodes,
        slots=topology.num_slots,
        balancedness_mean=float(np.mean([score.balancedness for score in scores])),
        fanout_ranks=float(np.mean([score.fanout_ranks for score in scores])),
        fanout_nodes=float(np.mean([score.fanout_nodes for score in scores])),
        requests=len(arrivals),
        refused=int((~served_N).sum()),
        duration_s=duration_s,
        steps=steps,
        step_ms_mean=float(found.step_s.mean()) * 1e3,
        step_ms_p50=float(np.percentile(found.step_s, 50)) * 1e3,
        step_ms_p99=float(np.percentile(found.step_s, 99)) * 1e3,
        attention_ms=found.attention_s / steps * 1e3,
        experts_ms=found.experts_s / steps * 1e3,
        exchange_ms=found.exchange_s / steps * 1e3,
        tokens_per_s=float(outputs_N.sum()) / duration_s,
        ttft_ms_p50=float(np.percentile(ttft_N, 50)) * 1e3,
        ttft_ms_p99=float(np.percentile(ttft_N, 99)) * 1e3,
        tpot_ms_p50=float(np.percentile(tpot_N[several_N], 50)) * 1e3 if several_N.any() else None,
        tpot_ms_p99=float(np.percentile(tpot_N[several_N], 99)) * 1e3 if several_N.any() else None,
        slo_share=good / len(arrivals),
        goodput_rps=good / duration_s,
        routing=routed.kind,
        constants=options.hardware.described(),
    )
