"""``expertmesh simulate``: what a placement would do on recorded routing, and to the requests that it serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.balancer.simulator import simulate as simulator
from expertmesh.balancer.simulator.arrivals import read_arrivals
from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import find_shape
from expertmesh.balancer.simulator.serve import ServeOptions, serve
from expertmesh.balancer.simulator.trace import read_trace
from expertmesh.cli import simulate_tables
from expertmesh.mesh.errors import UserError

SERVE = "With --serve"
_PANEL = {"rich_help_panel": SERVE}


def simulate(
    trace: Annotated[Path, typer.Argument(help="Recorded routing, an .npz of `expertmesh balancer record`.")],
    slots: Annotated[int, typer.Option(help="Slots of one layer over all ranks.")],
    ranks: Annotated[int, typer.Option(help="Expert ranks.")],
    nodes: Annotated[int, typer.Option(help="Nodes; ranks of one share fast links.")] = 1,
    train_fraction: Annotated[float, typer.Option(help="Part of the tokens to solve on; the rest scores.")] = 0.5,
    optimum: Annotated[bool, typer.Option("--optimum", help="Compare fan-out with the optimum (small sizes).")] = False,
    optimum_timeout_s: Annotated[float, typer.Option("--optimum-timeout", help="Seconds for --optimum.")] = 120.0,
    arrivals: Annotated[
        Path | None, typer.Option("--serve", metavar="ARRIVALS", help="Recorded arrivals to serve: .csv or .jsonl.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A known model's name or a checkpoint folder.", **_PANEL)] = None,
    attention_ranks: Annotated[
        int | None, typer.Option(help="Ranks for attention alone; unset = on the expert ranks.", **_PANEL)
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="Replay so many times as fast.", **_PANEL)] = 1.0,
    max_num_seqs: Annotated[int, typer.Option(help="Requests at a time on an attention rank.", **_PANEL)] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens a step of an attention rank.", **_PANEL)] = 2048,
    slo_ttft_ms: Annotated[float, typer.Option(help="Goodput: time to the first token.", **_PANEL)] = 2000.0,
    slo_tpot_ms: Annotated[float, typer.Option(help="Goodput: time of each further token.", **_PANEL)] = 50.0,
    max_layers: Annotated[int, typer.Option(help="Layers of the trace to place and count.", **_PANEL)] = 16,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another constant of the GPU.", **_PANEL)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, one a policy.")] = False,
) -> None:
    """Compare placements on a recorded trace: solved on its first part, scored on the rest.

    With --serve, replay recorded arrivals through a cost model of a mesh of GPUs under each placement.
    """
    recorded = read_trace(trace)
    topology = simulator.make_topology(recorded.num_experts, slots=slots, ranks=ranks, nodes=nodes)
    if arrivals is None:
        if optimum and not optimum_timeout_s > 0:
            raise UserError("--optimum-timeout", f"{optimum_timeout_s} is not above 0", "give seconds")
        results = simulator.simulate(recorded, topology, train_fraction, optimum_timeout_s if optimum else None)
        if as_json:
            typer.echo(json.dumps([result.as_dict() for result in results]))
        else:
            simulate_tables.print_scores(results)
        if optimum and results[0].optimum_layers < recorded.num_layers:
            solved = f"{results[0].optimum_layers} of {recorded.num_layers} layers"
            typer.echo(f"the optimum was found for {solved} in time: give a longer --optimum-timeout", err=True)
        return
    if optimum:
        raise UserError("--optimum", "does not go with --serve", "leave one of them out")
    if model is None:
        raise UserError("--model", "is not given, and a trace does not say it", "give the model that the trace is of")
    options = ServeOptions(
        shape=find_shape(model),
        hardware=Hardware().with_settings(settings or []),
        attention_ranks=attention_ranks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        slo_ttft_s=slo_ttft_ms / 1e3,
        slo_tpot_s=slo_tpot_ms / 1e3,
        max_layers=max_layers,
    )
    served = serve(recorded, read_arrivals(arrivals).faster(rate_scale), topology, options, train_fraction)
    if as_json:
        typer.echo(json.dumps([result.as_dict() for result in served]))
    else:
        simulate_tables.print_serving(served)
