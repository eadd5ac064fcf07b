"""The claims on real routing: ``tests/data/demo_routing.npz``, recorded from the demo model in eight domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from expertmesh.balancer.simulator.simulate import PolicyResult, make_topology, simulate
from expertmesh.balancer.simulator.trace import Trace, read_trace
from expertmesh.balancer.solver import Budget, Topology, count_routing, solve_layer
from expertmesh.balancer.solver.expected import balancedness, rank_loads
from expertmesh.cli.simulate import simulate as command
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.demo import demo_model_path

pytestmark = pytest.mark.slow

TRACE = Path(__file__).parents[1] / "data" / "demo_routing.npz"
MESH = ["--slots", "40", "--ranks", "8", "--nodes", "2"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(TRACE)


@pytest.fixture(scope="module")
def results(trace: Trace) -> dict[str, PolicyResult]:
    """On the first half of the tokens, scored on the other half: other prompts."""
    found = simulate(trace, make_topology(32, slots=40, ranks=8, nodes=2))
    return {result.policy: result for result in found}


def test_it_is_what_the_script_says(trace: Trace) -> None:
    assert trace.topk_LTK is not None
    assert trace.domain_T is not None
    assert trace.topk_LTK.shape == (8, 12_000, 4)
    assert trace.domain_names == ("stories", "novels", "german", "french", "spanish", "code", "dict", "math")
    assert np.bincount(trace.domain_T).tolist() == [1500] * 8
    assert TRACE.stat().st_size < 400_000


def test_tokens_visit_fewer_ranks_and_nodes_than_under_eplb(results: dict[str, PolicyResult]) -> None:
    ours, eplb = results["expertmesh"], results["eplb"]
    assert ours.fanout_ranks is not None
    assert ours.fanout_nodes is not None
    assert eplb.fanout_ranks is not None
    assert eplb.fanout_nodes is not None
    assert ours.fanout_ranks < 0.85 * eplb.fanout_ranks
    assert ours.fanout_nodes < 0.85 * eplb.fanout_nodes


def test_the_load_is_as_even_as_under_eplb(results: dict[str, PolicyResult]) -> None:
    assert results["expertmesh"].balancedness_mean > max(0.95, results["eplb"].balancedness_mean)
    assert results["expertmesh"].balancedness_min > results["eplb"].balancedness_min
    assert results["linear"].balancedness_mean < 0.7, "the demo model's experts are not equally popular"


def test_the_choice_of_replica_alone_explains_a_part_only(results: dict[str, PolicyResult]) -> None:
    """EPLB's placement with expertmesh's choice of replicas stands between the two."""
    fanouts = [results[name].fanout_ranks for name in ("expertmesh", "eplb_locality", "eplb")]
    assert fanouts == sorted(fanouts, key=float)  # type: ignore[arg-type]  # all of them have tokens


def test_a_shift_of_domain_is_followed_with_a_fifth_of_the_slots(trace: Trace) -> None:
    """Placed on prose in English, then German: eight loads a layer recover most of a full solve's balancedness."""
    assert trace.topk_LTK is not None
    assert trace.domain_T is not None
    topology = Topology.even(num_slots=40, num_ranks=8, num_nodes=2)
    english, german = np.isin(trace.domain_T, [0, 1]), trace.domain_T == 2
    stale: list[float] = []
    followed: list[float] = []
    solved: list[float] = []
    for topk_TK in trace.topk_LTK:
        current = solve_layer(*count_routing(topk_TK[english], 32), topology).slots
        load_E, pair_EE = count_routing(topk_TK[german], 32)
        plan = solve_layer(load_E, pair_EE, topology, current=current, budget=Budget(slots=8))
        assert plan.num_loads <= 8
        for kept, slots in ((stale, current), (followed, plan.slots)):
            kept.append(balancedness(rank_loads(slots.reshape(8, -1), load_E)))
        solved.append(solve_layer(load_E, pair_EE, topology).balancedness)
    assert np.mean(stale) < 0.5
    assert np.mean(followed) > 0.85 * np.mean(solved)


# The command line, on the same trace.


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(TRACE), *MESH, *arguments])


@pytest.fixture
def arrivals(tmp_path: Path) -> Path:
    path = tmp_path / "arrivals.csv"
    rows = [f"{0.01 * number},{50 + number % 7},{20 + number % 5}" for number in range(200)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return path


def serve(arrivals: Path, *arguments: str) -> Any:
    return run("--serve", str(arrivals), "--model", str(demo_model_path()), *arguments)


def test_serving_is_predicted_for_each_policy(arrivals: Path) -> None:
    result = serve(arrivals, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["policy"]: row for row in json.loads(result.output)}
    assert list(rows) == ["linear", "eplb", "expertmesh"]
    for row in rows.values():
        assert (row["requests"], row["refused"], row["ranks"], row["nodes"]) == (200, 0, 8, 2)
        parts = row["attention_ms"] + row["experts_ms"] + row["exchange_ms"]
        assert 0 < parts < row["step_ms_mean"]
        assert row["tokens_per_s"] == pytest.approx(200 * 22 / row["duration_s"])
        assert row["goodput_rps"] == pytest.approx(row["slo_share"] * 200 / row["duration_s"])
        assert row["constants"]["rdma_gb_per_s"] == {"value": 50.0, "source": "assumed: 400 Gb/s a GPU at line rate"}
        assert row["routing"] == "recorded"
    assert rows["expertmesh"]["exchange_ms"] < rows["eplb"]["exchange_ms"]
    assert rows["expertmesh"]["fanout_nodes"] < rows["eplb"]["fanout_nodes"]


def test_a_slower_network_is_felt_less_by_fewer_visits(arrivals: Path) -> None:
    slow = {row["policy"]: row for row in json.loads(serve(arrivals, "--set", "rdma_gb_per_s=0.01", "--json").output)}
    fast = {row["policy"]: row for row in json.loads(serve(arrivals, "--json").output)}
    assert slow["eplb"]["constants"]["rdma_gb_per_s"] == {"value": 0.01, "source": "given"}
    assert slow["eplb"]["tpot_ms_p50"] > 2 * fast["eplb"]["tpot_ms_p50"]
    assert slow["expertmesh"]["tpot_ms_p50"] < 0.9 * slow["eplb"]["tpot_ms_p50"]


def test_tokens_with_fewer_experts_cost_less(arrivals: Path, tmp_path: Path, trace: Trace) -> None:
    assert trace.topk_LTK is not None
    topk_LTK = trace.topk_LTK.copy()
    topk_LTK[:, :, 1:] = -1
    path = tmp_path / "one.npz"
    np.savez(path, num_experts=32, topk=topk_LTK)
    options = ["--serve", str(arrivals), "--model", str(demo_model_path()), "--json"]
    app = typer.Typer()
    app.command()(command)
    few = json.loads(CliRunner().invoke(app, [str(path), *MESH, *options]).output)
    for row, all_chosen in zip(few, json.loads(serve(arrivals, "--json").output), strict=True):
        assert row["fanout_ranks"] == row["fanout_nodes"] == 1
        assert row["experts_ms"] < all_chosen["experts_ms"]
        assert row["exchange_ms"] < all_chosen["exchange_ms"]


def test_an_objective_that_nobody_meets_is_no_goodput(arrivals: Path) -> None:
    rows = json.loads(serve(arrivals, "--slo-tpot-ms", "0.001", "--json").output)
    assert [row["goodput_rps"] for row in rows] == [0.0] * 3


def test_the_table_says_what_is_assumed(arrivals: Path) -> None:
    output = serve(arrivals, "--attention-ranks", "4").output
    assert output.count("\nexpertmesh ") == 1
    assert "Predicted, not measured" in output
    assert "rdma_us = 50: assumed" in output


@pytest.mark.parametrize(
    ("arguments", "key", "problem"),
    [
        (["--model", "nothing"], "--model", "'nothing' is no known model and no folder"),
        (["--model", "deepseek-r1"], "--model", "deepseek-r1 has 256 experts a layer, the trace 32"),
        (["--set", "speed=3"], "--set", "'speed=3' names no constant"),
        (["--set", "rdma_us=fast"], "--set rdma_us", "'fast' is no positive number"),
        (["--set", "rdma_gb_per_s=0"], "--set rdma_gb_per_s", "'0' is no positive number"),
        (["--set", "memory_share=2"], "--set memory_share", "2 is more than all memory"),
        (["--set", "memory_gb=0.001"], "--ranks", "a rank's weights take"),
        (["--set", "memory_gb=0.0169"], "--serve", "every request is longer than"),
        (["--attention-ranks", "3"], "--attention-ranks", "3 do not divide over 2 nodes"),
        (["--attention-ranks", "0"], "--attention-ranks", "0 is less than 1"),
        (["--max-num-seqs", "0"], "--max-num-seqs", "0 is less than 1"),
        (["--max-layers", "-1"], "--max-layers", "-1 is less than 1"),
        (["--slo-ttft-ms", "nan"], "--slo-ttft-ms", "nan is not above 0"),
        (["--rate-scale", "0"], "--rate-scale", "0.0 is not a positive number"),
        (["--train-fraction", "1"], "--train-fraction", "leaves a part empty"),
        (["--optimum"], "--optimum", "does not go with --serve"),
    ],
)
def test_refused(arrivals: Path, arguments: list[str], key: str, problem: str) -> None:
    error = serve(arrivals, *arguments).exception
    assert isinstance(error, UserError)
    assert error.key == key
    assert problem in error.problem
    assert error.remedy


def test_a_model_has_to_be_named(arrivals: Path) -> None:
    error = run("--serve", str(arrivals)).exception
    assert isinstance(error, UserError)
    assert error.key == "--model"


def test_an_optimum_that_is_not_found_in_time_is_missed_aloud() -> None:
    result = run("--slots", "32", "--optimum", "--optimum-timeout", "0.001")
    assert result.exit_code == 0
    assert "the optimum was found for 0 of 8 layers in time: give a longer --optimum-timeout" in result.stderr


@pytest.mark.parametrize("arguments", [["--optimum"], ["--slots", "32", "--optimum", "--optimum-timeout", "0"]])
def test_an_optimum_that_cannot_be_found_is_refused(arguments: list[str]) -> None:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    assert error.key.startswith("--optimum")
