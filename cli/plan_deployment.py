"""``expertmesh plan-deployment``: which layout of so many GPUs decodes fastest."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import find_shape
from expertmesh.balancer.simulator.planner import Demand, plan
from expertmesh.cli.simulate_tables import print_plans
from expertmesh.mesh.errors import UserError

GPUS = {"h200": Hardware()}


def plan_deployment(
    model: Annotated[str, typer.Option(help="A known model's name or a checkpoint folder.")],
    gpus: Annotated[int, typer.Option(help="How many of them.")],
    tpot_ms: Annotated[
        float | None, typer.Option("--tpot", metavar="MS", help="As many sequences as have a token in that time.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Instead of --tpot: so many sequences, whatever time a token takes.")
    ] = None,
    gpu: Annotated[str, typer.Option(help=f"Which kind: {', '.join(GPUS)}; others with --set.")] = "h200",
    context: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and output so far, in the mean.")] = 1024,
    gpus_per_node: Annotated[int, typer.Option(help="That share fast links.")] = 8,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another constant of the GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every layout, and the constants.")] = False,
) -> None:
    """Compare colocated ranks with attention and expert ranks apart, by a roofline of decoding.

    What it rests on and how far it is from measurements is in docs/simulator.md.
    """
    if gpu not in GPUS:
        raise UserError(
            "--gpu", f"{gpu!r} has no constants here", f"give one of {', '.join(GPUS)}, with --set for yours"
        )
    if (tpot_ms is None) == (sequences is None):
        raise UserError("--tpot", "and --sequences answer different questions", "give exactly one of them")
    hardware = GPUS[gpu].with_settings(settings or [])
    demand = Demand(
        shape=find_shape(model),
        num_gpus=gpus,
        tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
        sequences=sequences,
        context_tokens=context,
        gpus_per_node=gpus_per_node,
        hardware=hardware,
    )
    plans = plan(demand)
    if as_json:
        found = {"model": demand.shape.name, "plans": [one.as_dict() for one in plans]}
        typer.echo(json.dumps({**found, "constants": hardware.described()}))
    else:
        print_plans(demand, plans)
