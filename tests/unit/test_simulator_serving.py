"""The serving simulator: times by hand, what must hold for all of them, and agreement with what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.balancer.simulator.arrivals import Arrivals, make_arrivals
from expertmesh.balancer.simulator.batching import Limits, Replay, replay
from expertmesh.balancer.simulator.draw import draw_tokens
from expertmesh.balancer.simulator.expert_time import ExpertTimes, Origins, RoutedLayer, measure
from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import PRESETS, ModelShape, find_shape
from expertmesh.balancer.simulator.step_time import AttentionWork, StepTime
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh.errors import UserError

SHAPE = ModelShape(
    name="by hand", num_layers=2, num_moe_layers=2, num_experts=4, top_k=1, dense_params=1000, head_params=500,
    expert_params=100, weight_bytes=2.0, kv_bytes=8, decode_flops=4, prefill_flops=4, row_bytes=16,
)  # fmt: skip
UNITS = Hardware(
    memory_read_tb_per_s=2e-9, expert_read_tb_per_s=1e-9, matmul_tflop_per_s=1e-8, exchange_gb_per_s=1e-6,
    rdma_gb_per_s=0.5e-6, exchange_us=3e6, rdma_us=1e6, layer_us=5e5, step_us=7e6,
)  # fmt: skip
"""2,000 and 1,000 bytes a second, 10,000 flops a second, 1,000 and 500 bytes a second; 3, 1, 0.5 and 7 seconds."""
NO_EXPERTS = ExpertTimes(
    tokens_G=np.array([1.0]), experts_s=np.zeros(1), received_s=np.zeros(1), rdma_s=np.zeros(1), latency_s=0.0,
    sent_token_s=0.0, sent_token_rdma_s=0.0,
)  # fmt: skip
ROOMY = Limits(max_num_seqs=100, max_num_batched_tokens=100, kv_tokens=10_000)


def a_second_a_step() -> StepTime:
    shape = replace(SHAPE, dense_params=0, head_params=0, kv_bytes=0, decode_flops=0, prefill_flops=0)
    return StepTime(shape, replace(UNITS, step_us=1e6, layer_us=0.0), NO_EXPERTS)


def requests(*rows: tuple[float, int, int]) -> Arrivals:
    times, prompts, outputs = zip(*rows, strict=True)
    return make_arrivals(np.array(times), np.array(prompts), np.array(outputs))


# One request, constant load.


def test_one_request_prefills_in_chunks_then_gets_a_token_a_step() -> None:
    limits = replace(ROOMY, max_num_batched_tokens=4)
    found = replay(requests((0, 10, 5)), a_second_a_step(), limits, 1)
    assert (found.first_s[0], found.done_s[0]) == (3.0, 7.0)
    assert found.step_s.tolist() == [1.0] * 7


def test_one_output_token_ends_with_prefill() -> None:
    found = replay(requests((0, 3, 1)), a_second_a_step(), ROOMY, 2)
    assert (found.first_s[0], found.done_s[0]) == (1.0, 1.0)


def test_constant_load_is_served_at_its_rate() -> None:
    arrivals = requests(*[(10.0 * number, 1, 4) for number in range(50)])
    found = replay(arrivals, a_second_a_step(), ROOMY, 1)
    assert np.allclose(found.first_s - arrivals.arrival_s, 1.0)
    assert np.allclose(found.done_s - found.first_s, 3.0)
    assert len(found.step_s) == 200, "nothing is computed between the requests"


def test_a_request_waits_for_the_step_that_runs_then_for_nothing() -> None:
    found = replay(requests((0, 1, 10), (2.5, 1, 2)), a_second_a_step(), ROOMY, 1)
    assert (found.first_s[1], found.done_s[1]) == (4.0, 5.0)
    assert found.done_s[0] == 10.0, "the other one loses nothing: steps have a constant time here"


def test_a_full_cache_makes_requests_wait_and_never_fits_a_longer_one() -> None:
    limits = replace(ROOMY, kv_tokens=10)
    found = replay(requests((0, 3, 5), (0, 3, 5), (0, 8, 3)), a_second_a_step(), limits, 1)
    assert (found.done_s[0], found.first_s[1]) == (5.0, 6.0)
    assert np.isnan(found.first_s[2])
    assert np.isnan(found.done_s[2])


def test_sequences_are_limited_and_ranks_share_the_requests() -> None:
    limits = replace(ROOMY, max_num_seqs=1)
    arrivals = requests((0, 1, 5), (0, 1, 5), (0, 1, 5))
    assert replay(arrivals, a_second_a_step(), limits, 1).done_s.tolist() == [5.0, 10.0, 15.0]
    assert replay(arrivals, a_second_a_step(), limits, 3).done_s.tolist() == [5.0, 5.0, 5.0]


def test_decoding_looks_back_at_its_whole_context() -> None:
    """Prompt 3, output 3: the second token looks at 4 tokens, the third at 5."""
    shape = replace(SHAPE, dense_params=0, head_params=0, prefill_flops=0)
    step_time = StepTime(shape, replace(UNITS, step_us=0.0, layer_us=0.0), NO_EXPERTS)
    found = replay(requests((0, 3, 3)), step_time, ROOMY, 1)
    a_token = 2 * 8 / 2000  # layers x bytes / bytes a second, more than 2 x 4 flops at 10,000
    assert found.step_s == pytest.approx([0, 4 * a_token, 5 * a_token])


# A step's parts.


def test_attention_by_hand() -> None:
    step_time = StepTime(SHAPE, UNITS, NO_EXPERTS)
    work = AttentionWork(
        tokens_A=np.array([1, 50, 0]), sampled_A=np.array([1, 0, 0]), context_A=np.array([10, 0, 0]),
        pairs_A=np.array([0, 100, 0]),
    )  # fmt: skip
    read, head = 1000 * 2 / 2000, 500 * 2 / 2000
    context, pairs = 10 * 2 * 8 / 2000, 100 * 2 * 4 / 10_000
    assert step_time.attention(work) == pytest.approx([read + head + context, 50 * 2 * 1000 / 10_000 + pairs, 0])
    assert step_time.mesh(51, 50).fixed_s == pytest.approx(7 + 2 * 0.5)


def all_to_expert_0(tokens: int) -> RoutedLayer:
    return RoutedLayer(expert_TK=np.zeros((tokens, 1), np.int64), rank_TK=np.zeros((tokens, 1), np.int64))


def test_experts_and_exchange_by_hand() -> None:
    """Two ranks on two nodes; every token goes to expert 0 on rank 0, every second one comes from there."""
    topology = Topology.even(num_slots=4, num_ranks=2, num_nodes=2)
    origins = Origins(node_A=np.array([0, 1]), colocated=True)
    times = measure([all_to_expert_0(5)], topology, origins, SHAPE, UNITS, 64)
    layers, row = 2, 2 * 16
    assert times.experts(1) == pytest.approx(layers * 100 * 2 / 1000), "one token: reading the weights"
    assert times.experts(64) == pytest.approx(layers * 64 * 2 * 100 / 10_000), "many: multiplying"
    assert times.experts(640) == pytest.approx(10 * times.experts(64)), "beyond what was drawn"
    latency = layers * (3 + 1)
    received = layers * 32 * row * (1 / 1000 + 1 / 500)
    assert times.exchange(64, 32) == pytest.approx(latency + received)


def test_a_rank_that_sends_everything_makes_all_wait() -> None:
    """Four ranks of a node, every token visits them all, its own for nothing."""
    topology = Topology.even(num_slots=4, num_ranks=4)
    origins = Origins(node_A=np.zeros(4, np.int64), colocated=True)
    everywhere_TK = np.tile(np.arange(4), (5, 1))
    layer = RoutedLayer(expert_TK=everywhere_TK, rank_TK=everywhere_TK)
    times = measure([layer], topology, origins, SHAPE, UNITS, 64)
    layers, row_s = 2, 2 * 16 / 1000
    assert times.exchange(64, 16) == pytest.approx(layers * (3 + 48 * row_s))
    assert times.exchange(64, 64) == pytest.approx(layers * (3 + 192 * row_s))


def test_one_node_needs_no_network_and_one_rank_no_link() -> None:
    topology = Topology.even(num_slots=4, num_ranks=1)
    alone = Origins(node_A=np.array([0]), colocated=True)
    times = measure([all_to_expert_0(5)], topology, alone, SHAPE, UNITS, 8)
    assert times.exchange(8, 8) == 0.0, "there is nobody to exchange with"


@pytest.mark.parametrize(
    ("hidden", "measured_us"),
    [
        (7168, {8: 27, 64: 31, 128: 36, 512: 73, 4096: 438}),
        (2048, {8: 24, 64: 25, 128: 28, 512: 37, 4096: 142}),
    ],
)
def test_exchanges_are_what_deepep_was_measured_to_take(hidden: int, measured_us: dict[int, int]) -> None:
    """One attention rank and one expert rank of one node, all tokens from one to the other."""
    shape = replace(SHAPE, num_layers=1, num_moe_layers=1, row_bytes=2 * hidden)
    topology = Topology.even(num_slots=4, num_ranks=1)
    apart = Origins(node_A=np.array([0]), colocated=False)
    times = measure([all_to_expert_0(64)], topology, apart, shape, Hardware(), 4096)
    for tokens, microseconds in measured_us.items():
        assert times.exchange(tokens, tokens) * 1e6 == pytest.approx(microseconds, rel=0.1)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("deepseek-r1", 671.0), ("qwen3-30b-a3b", 30.5), ("gpt-oss-20b", 20.9), ("mixtral-8x7b", 46.7)],
)
def test_known_models_have_their_published_parameters(name: str, billions: float) -> None:
    shape = PRESETS[name]
    params = shape.dense_params + 2 * shape.head_params + shape.num_moe_layers * shape.num_experts * shape.expert_params
    assert params / 1e9 == pytest.approx(billions, rel=0.003)


def test_the_demo_model_is_read_from_its_folder() -> None:
    from expertmesh.mesh.model.demo import demo_model_path

    shape = find_shape(str(demo_model_path()))
    assert (shape.num_layers, shape.num_moe_layers, shape.num_experts, shape.top_k) == (8, 8, 32, 4)
    assert shape.expert_params == 3 * 256 * 56
    assert shape.kv_bytes == 2 * 2 * 64 * 2


# What holds for all.


def routed(num_ranks: int, seed: int) -> RoutedLayer:
    rng = np.random.default_rng(seed)
    expert_TK = rng.permuted(np.tile(np.arange(4), (200, 1)), axis=1)[:, :2]
    return RoutedLayer(expert_TK=expert_TK, rank_TK=expert_TK % num_ranks)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from([1, 2]), st.integers(1, 5000), st.integers(0, 5000))
def test_more_tokens_never_take_less(ranks: int, seed: int, nodes: int, tokens: int, more: int) -> None:
    nodes = min(nodes, ranks)
    topology = Topology.even(num_slots=4, num_ranks=ranks, num_nodes=nodes)
    origins = Origins(node_A=topology.node_R.astype(np.int64), colocated=True)
    times = measure([routed(ranks, seed)], topology, origins, SHAPE, UNITS, 1000, seed)
    assert times.experts(tokens) <= times.experts(tokens + more) + 1e-12
    assert times.exchange(tokens, tokens) <= times.exchange(tokens + more, tokens + more) + 1e-12


@pytest.mark.parametrize(
    ("constant", "factor"),
    [
        ("memory_read_tb_per_s", 2), ("expert_read_tb_per_s", 2), ("matmul_tflop_per_s", 2), ("exchange_gb_per_s", 2),
        ("rdma_gb_per_s", 2), ("exchange_us", 0.5), ("rdma_us", 0.5), ("layer_us", 0.5), ("step_us", 0.5),
    ],
)  # fmt: skip
def test_every_constant_matters_in_its_direction(constant: str, factor: float) -> None:
    topology = Topology.even(num_slots=4, num_ranks=2, num_nodes=2)
    origins = Origins(node_A=np.array([0, 1]), colocated=True)

    def seconds(hardware: Hardware) -> float:
        """A step with one token, where reading counts, and one with many, where multiplying does."""
        times = measure([routed(2, 0)], topology, origins, SHAPE, hardware, 1000)
        step_time = StepTime(SHAPE, hardware, times)
        total = 0.0
        for tokens in (1, 900):
            each_A = np.full(2, tokens)
            work = AttentionWork(tokens_A=each_A, sampled_A=each_A, context_A=each_A * 100, pairs_A=each_A)
            total += step_time.mesh(2 * tokens, tokens).total_s + step_time.attention(work).max()
        return float(total)

    assert seconds(replace(UNITS, **{constant: getattr(UNITS, constant) * factor})) < seconds(UNITS)


@st.composite
def loads(draw: st.DrawFn) -> tuple[Arrivals, Limits, int]:
    rows = draw(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=25))
    limits = Limits(
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 30)),
        kv_tokens=draw(st.integers(20, 120)),
    )
    return requests(*rows), limits, draw(st.integers(1, 3))


def step_time_of(hardware: Hardware) -> StepTime:
    topology = Topology.even(num_slots=4, num_ranks=2)
    origins = Origins(node_A=np.zeros(2, np.int64), colocated=True)
    return StepTime(SHAPE, hardware, measure([routed(2, 1)], topology, origins, SHAPE, hardware, 64))


FAST = replace(UNITS, step_us=1e5, layer_us=0.0, exchange_us=1e5)


@pytest.mark.slow
@settings(max_examples=60)
@given(loads())
def test_every_request_that_fits_is_served_in_order_of_cause(case: Any) -> None:
    arrivals, limits, ranks = case
    found = replay(arrivals, step_time_of(FAST), limits, ranks)
    fits = arrivals.prompt_tokens + arrivals.output_tokens <= limits.kv_tokens
    assert (np.isfinite(found.done_s) == fits).all()
    assert (found.first_s[fits] > arrivals.arrival_s[fits]).all()
    assert (found.done_s[fits] >= found.first_s[fits]).all()
    assert ((found.done_s == found.first_s)[fits] == (arrivals.output_tokens[fits] == 1)).all()
    parts = found.attention_s + found.experts_s + found.exchange_s + found.fixed_s
    assert found.step_s.sum() == pytest.approx(parts)
    shortest = (arrivals.output_tokens[fits] - 1) * (found.step_s.min() if len(found.step_s) else 0)
    assert (found.done_s[fits] - found.first_s[fits] >= shortest - 1e-9).all()


def same(one: Replay, other: Replay, factor: float = 1.0) -> None:
    assert one.first_s * factor == pytest.approx(other.first_s, nan_ok=True)
    assert one.done_s * factor == pytest.approx(other.done_s, nan_ok=True)
    assert one.step_s * factor == pytest.approx(other.step_s)


@pytest.mark.slow
@settings(max_examples=60)
@given(loads())
def test_steps_made_together_are_the_same_steps(case: Any) -> None:
    arrivals, limits, ranks = case
    step_time = step_time_of(FAST)
    same(replay(arrivals, step_time, limits, ranks), replay(arrivals, step_time, limits, ranks, max_block=1))


@pytest.mark.slow
@settings(max_examples=30)
@given(loads(), st.sampled_from([0.5, 4.0]))
def test_a_mesh_that_is_slower_throughout_serves_slower_arrivals_alike(case: Any, factor: float) -> None:
    """Powers of two: the floats are exactly as much larger."""
    arrivals, limits, ranks = case
    slower = Hardware(
        **{
            name: value * (factor if name.endswith("_us") else 1 / factor)
            for name, value in ((name, getattr(FAST, name)) for name in Hardware.sources())
        }
    )
    same(
        replay(arrivals, step_time_of(FAST), limits, ranks),
        replay(arrivals.faster(1 / factor), step_time_of(slower), limits, ranks),
        factor,
    )


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 6))
def test_drawn_tokens_have_the_loads(seed: int, top_k: int) -> None:
    load_E = np.random.default_rng(seed).gamma(2.0, 1.0, 16)
    load_E[3] = 0.0
    topk_TK = draw_tokens(load_E, top_k, 8000, seed)
    assert (np.diff(np.sort(topk_TK, axis=1), axis=1) > 0).all(), "no expert twice"
    share_E = np.bincount(topk_TK.ravel(), minlength=16) / 8000
    assert share_E[3] == 0
    expected_E = top_k * load_E / load_E.sum()
    if expected_E.max() < 1:
        assert np.abs(share_E - expected_E).max() < 0.03
    assert share_E.max() <= 1


def test_fewer_experts_than_a_token_chooses_are_refused() -> None:
    with pytest.raises(UserError, match="2 experts of a layer have a load"):
        draw_tokens(np.array([1.0, 1.0, 0.0, 0.0]), 3, 10, 0)
