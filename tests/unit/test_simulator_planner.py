"""The deployment planner: its arithmetic on sizes that can be done by hand, its limits, its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import PRESETS, ModelShape
from expertmesh.balancer.simulator.planner import MAX_SEQUENCES, Demand, Plan, plan
from expertmesh.cli.main import build_app
from expertmesh.mesh.errors import UserError

RESULTS = Path(__file__).parents[2] / "benchmarks/results"

# One layer, 4 experts that every token chooses all of: nothing is left to chance.
SHAPE = ModelShape(
    name="tiny",
    num_layers=1,
    num_moe_layers=1,
    num_experts=4,
    top_k=4,
    dense_params=10**9,
    head_params=0,
    expert_params=10**9,
    weight_bytes=1.0,
    kv_bytes=1000,
    decode_flops=0,
    prefill_flops=0,
    row_bytes=10**6,
)
# Reading 10^9 parameters takes 1 ms, multiplying a token with them 2 µs; a row there and back 2 µs.
HARDWARE = Hardware(
    memory_gb=10.0,
    memory_share=1.0,
    memory_read_tb_per_s=1.0,
    expert_read_tb_per_s=1.0,
    matmul_tflop_per_s=1000.0,
    exchange_gb_per_s=1000.0,
    exchange_us=100.0,
    layer_us=0.0,
    step_us=0.0,
)


def by_layout(demand: Demand) -> dict[str, Plan]:
    return {one.layout: one for one in plan(demand)}


def test_parts_of_a_step_by_hand() -> None:
    demand = Demand(shape=SHAPE, num_gpus=2, sequences=100, context_tokens=1000, hardware=HARDWARE)
    found = by_layout(demand)
    assert set(found) == {"2 both", "1A + 1E"}
    both = found["2 both"]
    assert both.micro_batches == 1, "reading everything twice cannot pay"
    # 50 sequences a rank of 1000 × 1000 bytes; two experts a rank.
    assert both.attention_ms == pytest.approx(1.0 + 0.05)
    assert both.experts_ms == pytest.approx(2.0)
    # Every rank takes in the other one's 50 tokens.
    assert both.exchange_ms == pytest.approx(0.1 + 50 * 2e-3)
    assert both.step_ms == pytest.approx(1.05 + 2.0 + 0.2)
    assert both.tokens_per_s == pytest.approx(100 / 3.25e-3)
    assert both.active_experts == pytest.approx(4.0)
    apart = found["1A + 1E"]
    assert apart.step_ms == pytest.approx(1.1 + 4.0 + 0.1 + 100 * 2e-3)
    assert apart.hidden_exchange == pytest.approx(0.0)
    assert (both.bound, apart.bound) == ("experts", "experts")


def test_micro_batches_hide_exchanges_when_tokens_weigh_more_than_weights() -> None:
    hardware = replace(HARDWARE, memory_gb=100.0, exchange_gb_per_s=10.0)  # a row there and back: 0.2 ms
    demand = Demand(shape=SHAPE, num_gpus=2, sequences=2000, context_tokens=1000, hardware=hardware)
    both = by_layout(demand)["2 both"]
    # Experts: 2000 tokens × 2 experts × 2 µs = 8 ms, exchange 200 ms: nothing hides that, a part of it is hidden.
    assert both.micro_batches > 1
    assert both.bound == "exchange"
    assert both.step_ms == pytest.approx(both.exchange_ms, rel=1e-3)
    assert 0 < both.hidden_exchange < 0.2
    fast = replace(hardware, exchange_gb_per_s=250.0)
    both = by_layout(replace(demand, hardware=fast))["2 both"]
    assert both.hidden_exchange > 0.6


def test_a_single_gpu_exchanges_nothing() -> None:
    (alone,) = plan(Demand(shape=SHAPE, num_gpus=1, sequences=10, context_tokens=10, hardware=HARDWARE))
    assert alone.layout == "1 both"
    assert alone.exchange_ms == 0.0


def test_memory_bounds_the_sequences() -> None:
    # An attention rank alone has 10 − 1 GB for sequences of 10^9 / 2 bytes.
    demand = Demand(shape=SHAPE, num_gpus=2, tpot_s=1.0, context_tokens=500_000, hardware=HARDWARE)
    apart = by_layout(demand)["1A + 1E"]
    assert apart.sequences == 18 - 18 % apart.micro_batches
    assert apart.bound == "memory"
    with pytest.raises(UserError, match="no layout"):
        plan(replace(demand, context_tokens=10**8))
    with pytest.raises(UserError, match="no layout"):
        plan(replace(demand, hardware=replace(HARDWARE, memory_gb=2.0)))


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    gpus=st.integers(1, 6),
    tpot_ms=st.floats(5, 200),
    context=st.integers(1, 20_000),
)
def test_every_plan_keeps_what_was_asked_for(name: str, gpus: int, tpot_ms: float, context: int) -> None:
    demand = Demand(shape=PRESETS[name], num_gpus=gpus, tpot_s=tpot_ms / 1e3, context_tokens=context)
    try:
        found = plan(demand)
    except UserError:
        return
    assert [one.tokens_per_s for one in found] == sorted((one.tokens_per_s for one in found), reverse=True)
    for one in found:
        assert one.step_ms <= tpot_ms
        assert 1 <= one.sequences <= MAX_SEQUENCES * one.attention_ranks
        assert 0 <= one.hidden_exchange <= 1
        assert one.attention_ranks + (0 if one.colocated else one.expert_ranks) == gpus
        assert one.step_ms >= max(one.attention_ms, one.experts_ms), "a GPU does one thing at a time"


def test_decode_steps_of_one_gpu_are_what_was_measured() -> None:
    """docs/simulator.md has the table."""
    rows = json.loads((RESULTS / "gpu_decode.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 6
    for row in rows:
        (predicted,) = plan(
            Demand(
                shape=PRESETS["qwen3-30b-a3b"],
                num_gpus=1,
                sequences=row["requests"],
                context_tokens=row["tokens_in"] + row["tokens_out"] // 2,
            )
        )
        assert predicted.step_ms == pytest.approx(row["step_ms"], rel=0.1), row
        assert predicted.active_experts == pytest.approx(row["active_experts"], rel=0.03)


def test_the_command() -> None:
    arguments = ["plan-deployment", "--model", "qwen3-30b-a3b", "--gpus", "2"]
    app = build_app(arguments)
    result = CliRunner().invoke(app, [*arguments, "--tpot", "20", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["plans"][0]["layout"] == "2 both"
    assert answer["constants"]["memory_read_tb_per_s"]["source"]
    text = CliRunner().invoke(app, [*arguments, "--sequences", "64"])
    assert "1A + 1E" in text.stdout
    for wrong in (["--tpot", "0"], ["--tpot", "20", "--sequences", "3"], ["--sequences", "0"], ["--gpu", "abacus"], []):
        refused = CliRunner().invoke(app, [*arguments, *wrong])
        assert isinstance(refused.exception, UserError), wrong
