"""Which layout of N GPUs decodes most tokens a second within a time per token: a roofline of the whole mesh.

Layouts are colocated ranks (``both``), and A attention + E expert ranks; each with 1 to ``MAX_MICRO_BATCHES`` micro-
batches in ping-pong. With m of them a layer takes max(m·A, m·E, m·C, A + E + C) when attention (A) and experts (E) of a
micro-batch run on different GPUs and exchanges (C) over the links (MegaScale-Infer, arXiv:2504.02263, section 4), and
max(m·(A + E), m·C, A + E + C) when they share one. Each micro-batch reads its experts anew: small ones pay for that.

It is the steady state of decoding, all sequences with the same context, routing uniform; prefill is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from expertmesh.balancer.simulator.expert_time import Origins, RoutedLayer, measure
from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import ModelShape
from expertmesh.balancer.simulator.step_time import AttentionWork, StepTime
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh.errors import UserError

MAX_MICRO_BATCHES = 4
MAX_SEQUENCES = 4096
"""Of one attention rank: what a scheduler can be asked to hold."""
MAX_SPLITS = 32
DRAWN_TOKENS = 1 << 13
"""Of uniform routing, from which batches are drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is asked for.

    Args:
        tpot_s: the longest time of a token; as many sequences are taken as have it.
        sequences: instead of ``tpot_s``: so many over all attention ranks, whatever time a token takes.
        context_tokens: of a sequence, prompt and output so far, in the mean.
    """

    shape: ModelShape
    num_gpus: int
    tpot_s: float | None = None
    sequences: int | None = None
    context_tokens: int = 1024
    gpus_per_node: int = 8
    hardware: Hardware = field(default_factory=Hardware)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout with as many sequences as fit the time and the memory. Milliseconds of one step.

    Args:
        attention_ranks, expert_ranks: the same GPUs when ``colocated``.
        sequences: over all attention ranks.
        attention_ms, experts_ms, exchange_ms: summed over layers and micro-batches, as if nothing overlapped.
        hidden_exchange: share of ``exchange_ms`` behind which something else ran.
        active_experts: mean number a layer that one micro-batch chooses.
        bound: what limits it: ``attention``, ``experts`` or ``exchange`` (whichever takes longest), ``latency`` (one of
            several micro-batches on its way through a layer), ``memory`` (of the KV cache) or ``sequences``
            (``MAX_SEQUENCES``).
    """

    colocated: bool
    attention_ranks: int
    expert_ranks: int
    micro_batches: int
    sequences: int
    step_ms: float
    attention_ms: float
    experts_ms: float
    exchange_ms: float
    hidden_exchange: float
    active_experts: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    bound: str

    @property
    def layout(self) -> str:
        return f"{self.attention_ranks} both" if self.colocated else f"{self.attention_ranks}A + {self.expert_ranks}E"

    def as_dict(self) -> dict[str, Any]:
        return {"layout": self.layout, **asdict(self)}


def plan(demand: Demand) -> list[Plan]:
    """Every layout that meets the demand, with its best number of micro-batches, the fastest first.

    Raises:
        UserError: a number is out of range, or no layout holds the weights and meets the time.
    """
    _check(demand)
    found = [best for layout in _layouts(demand) if (best := _best(layout, demand)) is not None]
    if not found:
        wanted = "--tpot" if demand.sequences is None else "--sequences"
        problem = f"no layout of {demand.num_gpus} GPUs holds {demand.shape.name} and as much"
        raise UserError(wanted, problem, "give more --gpus, a shorter --context, a longer --tpot or fewer --sequences")
    return sorted(found, key=lambda one: (-one.tokens_per_s, not one.colocated, one.attention_ranks))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    colocated: bool
    attention_ranks: int
    expert_ranks: int
    max_sequences: int
    bound_by_memory: bool
    time: StepTime


def _check(demand: Demand) -> None:
    assert (demand.tpot_s is None) != (demand.sequences is None), "a demand is a time or a number of sequences"
    for key, value in (
        ("--gpus", demand.num_gpus),
        ("--gpus-per-node", demand.gpus_per_node),
        ("--context", demand.context_tokens),
        ("--sequences", demand.sequences),
    ):
        if value is not None and value < 1:
            raise UserError(key, f"{value} is less than 1", "give 1 or more")
    if demand.tpot_s is not None and not demand.tpot_s > 0:
        raise UserError("--tpot", f"{1e3 * demand.tpot_s:g} is not above 0", "give milliseconds")


def _layouts(demand: Demand) -> Iterator[_Layout]:
    splits = np.unique(np.linspace(1, demand.num_gpus - 1, MAX_SPLITS).astype(int)) if demand.num_gpus > 1 else ()
    for attention_ranks in (None, *(int(split) for split in splits)):
        layout = _layout(demand, attention_ranks)
        if layout is not None:
            yield layout


def _layout(demand: Demand, attention_ranks: int | None) -> _Layout | None:
    """None where the weights or a single sequence do not fit."""
    shape, colocated = demand.shape, attention_ranks is None
    num_attention = demand.num_gpus if attention_ranks is None else attention_ranks
    num_experts = demand.num_gpus if attention_ranks is None else demand.num_gpus - attention_ranks
    if num_experts > shape.num_experts:
        return None
    nodes = min(-(-demand.num_gpus // demand.gpus_per_node), num_experts)
    topology = Topology.even(num_slots=shape.num_experts, num_ranks=num_experts, num_nodes=nodes)
    by_memory = _sequences_of_memory(demand, topology.width, colocated=colocated)
    if by_memory < 1:
        return None
    most = min(by_memory, MAX_SEQUENCES)
    node_A = np.arange(num_attention) * nodes // num_attention
    origins = Origins(node_A=topology.node_R.astype(np.int64) if colocated else node_A, colocated=colocated)
    times = measure([_uniform(shape, topology)], topology, origins, shape, demand.hardware, num_attention * most)
    return _Layout(
        colocated=colocated,
        attention_ranks=num_attention,
        expert_ranks=num_experts,
        max_sequences=most,
        bound_by_memory=by_memory <= MAX_SEQUENCES,
        time=StepTime(shape, demand.hardware, times),
    )


def _sequences_of_memory(demand: Demand, width: int, *, colocated: bool) -> int:
    """How many sequences one attention rank's KV cache holds beside its weights."""
    shape, hardware = demand.shape, demand.hardware
    room = hardware.memory_gb * 1e9 * hardware.memory_share
    experts = width * shape.num_moe_layers * shape.expert_bytes
    dense = (shape.dense_params + 2 * shape.head_params) * shape.weight_bytes
    if experts > room:
        return 0
    free = room - dense - (experts if colocated else 0)
    return int(free // (demand.context_tokens * shape.num_layers * shape.kv_bytes))


def _uniform(shape: ModelShape, topology: Topology) -> RoutedLayer:
    """Tokens that choose their experts by chance, experts in order over the ranks."""
    rng = np.random.default_rng(0)
    scores_TE = rng.random((DRAWN_TOKENS, shape.num_experts), dtype=np.float32)
    expert_TK = np.argpartition(scores_TE, shape.top_k - 1, axis=1)[:, : shape.top_k]
    rank_E = np.repeat(np.arange(topology.num_ranks), topology.slots_of_rank)
    return RoutedLayer(expert_TK=expert_TK, rank_TK=rank_E[expert_TK])


def _best(layout: _Layout, demand: Demand) -> Plan | None:
    """The number of micro-batches that makes most tokens in time; the smaller one among equals."""
    plans = [_fullest(layout, demand, number) for number in range(1, MAX_MICRO_BATCHES + 1)]
    return max((one for one in plans if one is not None), key=lambda one: one.tokens_per_s, default=None)


def _fullest(layout: _Layout, demand: Demand, micro_batches: int) -> Plan | None:
    """The sequences that were asked for, or the most, a multiple of the micro-batches, that meet the time."""
    low, high = 0, layout.max_sequences // micro_batches
    if demand.sequences is not None:
        fits = micro_batches <= demand.sequences <= high * micro_batches * layout.attention_ranks
        return _plan(layout, demand, micro_batches, demand.sequences) if fits else None
    assert demand.tpot_s is not None, "checked before"
    while low < high:
        middle = (low + high + 1) // 2
        sequences = middle * micro_batches * layout.attention_ranks
        if _plan(layout, demand, micro_batches, sequences).step_ms <= 1e3 * demand.tpot_s:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        return None
    return _plan(layout, demand, micro_batches, low * micro_batches * layout.attention_ranks)


def _plan(layout: _Layout, demand: Demand, micro_batches: int, sequences: int) -> Plan:
    shape, hardware = demand.shape, demand.hardware
    share = sequences / micro_batches
    busiest = int(np.ceil(share / layout.attention_ranks))
    of_rank = np.array([busiest])
    none = np.zeros(1, np.int64)
    work = AttentionWork(tokens_A=of_rank, sampled_A=of_rank, context_A=of_rank * demand.context_tokens, pairs_A=none)
    layers_s = hardware.layer_us * 1e-6 * shape.num_layers
    attention_s = float(layout.time.attention(work)[0]) + layers_s
    mesh = layout.time.mesh(round(share), busiest)
    experts_s, exchange_s = mesh.experts_s, mesh.exchange_s
    bound, busy_s = _busiest(layout, micro_batches, attention_s, experts_s, exchange_s)
    latency_s = attention_s + experts_s + exchange_s
    if micro_batches > 1 and latency_s > busy_s:
        bound = "latency"
    step_s = max(busy_s, latency_s) + hardware.step_us * 1e-6
    most = layout.max_sequences // micro_batches * micro_batches * layout.attention_ranks
    if sequences == most:
        bound = "memory" if layout.bound_by_memory else "sequences"
    exchanges_s = micro_batches * exchange_s
    computing_s = attention_s + experts_s if layout.colocated else max(attention_s, experts_s)
    seen_s = step_s - hardware.step_us * 1e-6 - max(micro_batches * computing_s, attention_s + experts_s)
    return Plan(
        colocated=layout.colocated,
        attention_ranks=layout.attention_ranks,
        expert_ranks=layout.expert_ranks,
        micro_batches=micro_batches,
        sequences=sequences,
        step_ms=1e3 * step_s,
        attention_ms=1e3 * micro_batches * attention_s,
        experts_ms=1e3 * micro_batches * experts_s,
        exchange_ms=1e3 * exchanges_s,
        hidden_exchange=min(1.0, max(0.0, 1 - seen_s / exchanges_s)) if exchanges_s else 0.0,
        active_experts=shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** share),
        tokens_per_s=sequences / step_s,
        tokens_per_s_per_gpu=sequences / step_s / demand.num_gpus,
        bound=bound,
    )


def _busiest(
    layout: _Layout, micro_batches: int, attention_s: float, experts_s: float, exchange_s: float
) -> tuple[str, float]:
    """What has most to do for all micro-batches together, and the seconds it takes."""
    own = {"attention": attention_s, "experts": experts_s, "exchange": exchange_s}
    bound = max(own, key=lambda name: own[name])
    if layout.colocated and bound != "exchange":
        return bound, micro_batches * (attention_s + experts_s)
    if layout.colocated:
        return bound, micro_batches * max(exchange_s, attention_s + experts_s)
    return bound, micro_batches * own[bound]
