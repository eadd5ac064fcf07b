"""What ``expertmesh simulate`` and ``plan-deployment`` print for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from expertmesh.balancer.simulator.planner import Demand, Plan
from expertmesh.balancer.simulator.serve import ServeResult
from expertmesh.balancer.simulator.simulate import PolicyResult

NONE = "–"
PLANS_SHOWN = 8


def print_scores(results: list[PolicyResult]) -> None:
    """Placement quality, a line for each policy."""
    table = _table("balanced", "min", "gap", "ranks", "nodes", "solve ms", "loaded")
    with_optimum = any(result.fanout_optimum is not None for result in results)
    if with_optimum:
        table.add_column("above opt.", justify="right", no_wrap=True)
    for result in results:
        cells = [
            result.policy,
            f"{result.balancedness_mean:.4f}",
            f"{result.balancedness_min:.4f}",
            f"{result.balancedness_gap:.4f}",
            _number(result.fanout_ranks, ".3f"),
            _number(result.fanout_nodes, ".3f"),
            f"{result.solve_ms:.1f}",
            f"{result.slots_loaded_per_layer:.1f}",
        ]
        table.add_row(*cells, *([_number(result.fanout_gap, ".2%")] if with_optimum else []))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "balanced: mean rank load / fullest, over the layers; gap: to the bound for an equal split of replicas"
    )
    console.print(
        "ranks, nodes: visited by a token in a layer; loaded: slots a layer, coming from the linear placement"
    )
    if with_optimum:
        solved = results[0].optimum_layers
        console.print(f"optimum: {results[0].fanout_optimum:.3f} ranks a token, over {solved} layers")


def print_serving(results: list[ServeResult]) -> None:
    """Predicted serving, a line for each policy, and what the prediction rests on."""
    table = _table("step", "attn", "expert", "exch", "tokens/s", "TTFT", "p99", "TPOT", "p99", "good/s")
    for result in results:
        table.add_row(
            result.policy,
            f"{result.step_ms_mean:.1f}",
            f"{result.attention_ms:.1f}",
            f"{result.experts_ms:.1f}",
            f"{result.exchange_ms:.1f}",
            f"{result.tokens_per_s:,.0f}",
            f"{result.ttft_ms_p50:.0f}",
            f"{result.ttft_ms_p99:.0f}",
            _number(result.tpot_ms_p50, ".1f"),
            _number(result.tpot_ms_p99, ".1f"),
            f"{result.goodput_rps:.2f}",
        )
    first = results[0]
    refused = f", {first.refused} refused" if first.refused else ""
    mesh = f"{first.ranks} ranks in {first.nodes} nodes, {first.slots} slots"
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{first.model} on {mesh}, {first.requests} requests{refused}; routing {first.routing}")
    console.print(
        "Predicted, not measured. Milliseconds: a mean step and its parts, TTFT and TPOT (median, 99th percentile)."
    )
    console.print("good/s: requests a second that met both objectives. Constants:")
    for name, constant in first.constants.items():
        console.print(f"  {name} = {constant['value']:g}: {constant['source']}")


def print_plans(demand: Demand, plans: list[Plan]) -> None:
    """The fastest layouts, a line each."""
    table = _table(
        "batches", "seqs", "step", "attn", "expert", "exch", "hidden", "tokens/s", "a GPU", "bound", first="layout"
    )
    for one in plans[:PLANS_SHOWN]:
        table.add_row(
            one.layout,
            str(one.micro_batches),
            str(one.sequences),
            *(f"{ms:.1f}" for ms in (one.step_ms, one.attention_ms, one.experts_ms, one.exchange_ms)),
            f"{one.hidden_exchange:.0%}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.tokens_per_s_per_gpu:,.0f}",
            one.bound,
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if len(plans) > PLANS_SHOWN:
        console.print(f"and {len(plans) - PLANS_SHOWN} layouts that are slower: --json has them")
    console.print(
        f"{demand.shape.name} on {demand.num_gpus} GPUs, contexts of {demand.context_tokens}. Predicted, not measured."
    )
    console.print(
        "Milliseconds of a step: its parts over all micro-batches, and the share of the exchanges that is hidden"
    )


def _table(*columns: str, first: str = "policy") -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # fits 80 columns
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
