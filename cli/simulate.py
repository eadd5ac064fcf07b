"""``expertmesh simulate``: what a placement would do on recorded routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.balancer.simulator import simulate as simulator
from expertmesh.balancer.simulator.trace import read_trace


def simulate(
    trace: Annotated[Path, typer.Argument(help="Recorded routing, an .npz of `expertmesh balancer record`.")],
    slots: Annotated[int, typer.Option(help="Slots of one layer over all ranks.")],
    ranks: Annotated[int, typer.Option(help="Expert ranks.")],
    nodes: Annotated[int, typer.Option(help="Nodes; ranks of one share fast links.")] = 1,
    train_fraction: Annotated[float, typer.Option(help="Part of the tokens to solve on; the rest scores.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, one a policy.")] = False,
) -> None:
    """Compare placements on a recorded trace: solved on its first part, scored on the rest."""
    recorded = read_trace(trace)
    topology = simulator.make_topology(recorded.num_experts, slots=slots, ranks=ranks, nodes=nodes)
    results = simulator.simulate(recorded, topology, train_fraction)
    if as_json:
        typer.echo(json.dumps([result.as_dict() for result in results]))
    else:
        Console().print(_table(results))


def _table(results: list[simulator.PolicyResult]) -> Table:
    table = Table("policy", title="Balancedness: mean rank load / fullest. Fan-out: visits per token and layer.")
    for column in ("balancedness", "min", "ranks/token", "nodes/token", "solve ms", "slots loaded/layer"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.policy,
            f"{result.balancedness_mean:.4f}",
            f"{result.balancedness_min:.4f}",
            "–" if result.fanout_ranks is None else f"{result.fanout_ranks:.3f}",
            "–" if result.fanout_nodes is None else f"{result.fanout_nodes:.3f}",
            f"{result.solve_ms:.1f}",
            f"{result.slots_loaded_per_layer:.1f}",
        )
    return table
