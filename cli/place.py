"""``expertmesh place``: a placement file from a recorded trace, without a mesh; mode `offline` starts from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmesh.balancer.placement_file import PlacementFile, write_placement_file
from expertmesh.balancer.simulator.simulate import make_topology
from expertmesh.balancer.simulator.trace import Trace, read_trace
from expertmesh.balancer.solver.solve import solve_layer
from expertmesh.balancer.solver.topology import Topology
from expertmesh.cli.admin_client import JsonOption, print_json
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.v1 import mesh_pb2


def place(
    trace: Annotated[Path, typer.Argument(help="Recorded routing, an .npz of `expertmesh balancer record`.")],
    slots: Annotated[int, typer.Option(help="Slots of one layer over all expert servers.")],
    ranks: Annotated[int, typer.Option(help="Expert servers.")],
    out: Annotated[Path, typer.Option(help="The placement file to write.")],
    nodes: Annotated[int, typer.Option(help="Nodes; servers of one share fast links.")] = 1,
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder; unset = the demo model.")] = None,
    dtype: Annotated[str, typer.Option(help="That the mesh will run: float32 or bfloat16.")] = "float32",
    servers: Annotated[
        str | None, typer.Option(help="Ids of the expert servers, by node; unset = expert-0,expert-1,... as `up` has.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Place every layer's experts for the load and co-activation of a trace, and write a placement file.

    A mesh starts from it with `balancer.mode: offline` and `balancer.placement_file`; `expertmesh balancer apply`
    takes files of `balancer plan --out` instead, which name the view that they change.
    """
    recorded = read_trace(trace)
    topology = make_topology(recorded.num_experts, slots=slots, ranks=ranks, nodes=nodes)
    names = _names(servers, ranks)
    if dtype not in ("float32", "bfloat16"):
        raise UserError("--dtype", f"is {dtype!r}", "choose float32 or bfloat16")
    spec = load_spec(ModelConfig(path=model, dtype="bfloat16" if dtype == "bfloat16" else "float32"))
    _check_model(recorded, spec)
    write_placement_file(out, _solve(recorded, topology, spec, names))
    if as_json:
        print_json({"file": str(out), "layers": list(spec.moe_layers), "slots": slots, "servers": names})
    else:
        typer.echo(f"wrote {out}: {len(spec.moe_layers)} layers, {slots} slots on {ranks} servers")


def _names(servers: str | None, ranks: int) -> list[str]:
    names = [f"expert-{rank}" for rank in range(ranks)] if servers is None else servers.split(",")
    if len(names) != ranks or len(set(names)) != ranks or not all(names):
        raise UserError("--servers", f"{servers!r} does not name {ranks} servers", "give one id for each of --ranks")
    return names


def _check_model(recorded: Trace, spec: ModelSpec) -> None:
    if recorded.num_experts != spec.num_experts or recorded.num_layers != len(spec.moe_layers):
        raise UserError(
            "--model",
            f"{spec.name} has {len(spec.moe_layers)} MoE layers of {spec.num_experts} experts, the trace "
            f"{recorded.num_layers} of {recorded.num_experts}",
            "give the model that the trace was recorded from",
        )


def _solve(recorded: Trace, topology: Topology, spec: ModelSpec, names: list[str]) -> PlacementFile:
    load_LE, pair_LEE = recorded.counts(slice(None))
    layers = []
    for index, layer in enumerate(spec.moe_layers):
        solved = solve_layer(load_LE[index], None if pair_LEE is None else pair_LEE[index], topology)
        layers.append(mesh_pb2.LayerPlacement(layer=layer, version=0, slots=solved.slots.tolist()))
    per_server = topology.num_slots // topology.num_ranks
    return PlacementFile(
        source="",
        model=spec.name,
        fingerprint=spec.fingerprint,
        num_experts=spec.num_experts,
        view_number=0,
        slot_servers=tuple(name for name in names for _ in range(per_server)),
        layers=tuple(layers),
    )
