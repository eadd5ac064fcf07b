"""``expertmesh balancer plan``, ``apply`` and ``mode``: what the balancer would move, and having it moved."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from expertmesh.balancer.placement_file import PlacementFile, read_placement_file, write_placement_file
from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import TIMEOUT_S, UINT32_MAX, BalancerOption, ConfigOption, JsonOption
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

PLAN_TIMEOUT_S = 330.0
"""Longer than the balancer lets a search take: the first one compiles the solver."""
_POLL_S = 0.2

LayersArgument = Annotated[
    list[int] | None, typer.Argument(min=0, max=UINT32_MAX, help="Layers to plan for; none = all.")
]
FullOption = Annotated[bool, typer.Option("--full", help="Place afresh instead of within max_slots_per_update.")]


def plan(
    layers: LayersArgument = None,
    full: FullOption = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write a placement file, for `apply`.")] = None,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """A dry run: what would change now, with the predicted effect. Nothing moves."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        answer = await _get_plan(stub, layers or [], full)
        if out is not None:
            write_placement_file(out, plan_as_file(answer))
        if as_json:
            admin_client.print_json(plan_as_dict(answer))
        else:
            _print_plan(answer, out)

    admin_client.run(ask, balancer, config)


def apply(
    file: Annotated[Path | None, typer.Argument(help="Placement file; none = the current plan.")] = None,
    full: FullOption = False,
    wait: Annotated[bool, typer.Option(help="Until every layer has migrated; exit status 1 when one did not.")] = True,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Migrate to a placement file, or to the current plan, layer by layer, while the mesh serves.

    The file's view and versions must be those of the mesh: else somebody was faster, and nothing changes.
    """
    if file is not None and full:
        raise typer.BadParameter("--full plans anew: leave it out with a file")
    wanted = read_placement_file(file) if file is not None else None

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        placement = wanted or plan_as_file(await _get_plan(stub, [], full))
        if not placement.layers:
            _print_applied([], {}, as_json)
            return
        accepted = (await stub.Apply(_apply_request(placement), timeout=TIMEOUT_S)).accepted
        reached = await wait_applied(stub, accepted) if wait else None
        _print_applied(accepted, reached, as_json)
        if reached is not None and not all(reached.values()):
            raise typer.Exit(1)

    admin_client.run(ask, balancer, config)


def mode(
    mode: Annotated[str | None, typer.Argument(metavar="[static|online]", help="Unset = show it.")] = None,
    layer_updates_per_iter: Annotated[
        int | None, typer.Option(min=0, max=UINT32_MAX, help="Layers that migrate at a time; unset = as it is.")
    ] = None,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show or switch the mode. It outlives the balancer, until the configuration names another one."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        previous = status.balancer_mode
        if mode is not None or layer_updates_per_iter is not None:
            request = admin_pb2.SetModeRequest(mode=mode or previous, layer_updates_per_iter=layer_updates_per_iter)
            previous = (await stub.SetMode(request, timeout=TIMEOUT_S)).previous
            status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        now = {"mode": status.balancer_mode, "layer_updates_per_iter": status.layer_updates_per_iter}
        if as_json:
            admin_client.print_json(now | {"previous": previous})
        else:
            was = f" (was {previous})" if previous != status.balancer_mode else ""
            typer.echo(f"{status.balancer_mode}{was}, {status.layer_updates_per_iter} layers at a time")

    admin_client.run(ask, balancer, config)


def plan_as_dict(plan: admin_pb2.GetPlanResponse) -> dict[str, Any]:
    """The contract of ``plan --json``."""
    return {
        "view": plan.view_number,
        "model": plan.model.name,
        "layers": [
            {
                "layer": change.placement.layer,
                "version": change.placement.version,
                "slots": list(change.placement.slots),
                "balancedness": [round(change.balancedness_before, 6), round(change.balancedness_after, 6)],
                "fanout_ranks": [round(change.fanout_ranks_before, 6), round(change.fanout_ranks_after, 6)],
                "fanout_nodes": [round(change.fanout_nodes_before, 6), round(change.fanout_nodes_after, 6)],
                "slots_loaded": change.slots_loaded,
                "bytes": change.bytes,
                "gain": round(change.gain, 6),
                "noise": round(change.noise, 6),
                "worthwhile": change.worthwhile,
            }
            for change in plan.changes
        ],
    }


def plan_as_file(plan: admin_pb2.GetPlanResponse) -> PlacementFile:
    """The plan's changes as a placement file; layers that do not change are not in it."""
    return PlacementFile(
        source="the plan",
        model=plan.model.name,
        fingerprint=plan.fingerprint,
        num_experts=plan.model.num_experts,
        view_number=plan.view_number,
        slot_servers=tuple(plan.slot_servers),
        layers=tuple(change.placement for change in plan.changes),
    )


async def _get_plan(
    stub: admin_pb2_grpc.AdminServiceStub, layers: Sequence[int], full: bool
) -> admin_pb2.GetPlanResponse:
    return await stub.GetPlan(admin_pb2.GetPlanRequest(layers=layers, full=full), timeout=PLAN_TIMEOUT_S)


def _apply_request(placement: PlacementFile) -> admin_pb2.ApplyRequest:
    return admin_pb2.ApplyRequest(
        view_number=placement.view_number,
        layers=placement.layers,
        slot_servers=placement.slot_servers,
        fingerprint=placement.fingerprint,
        num_experts=placement.num_experts,
    )


async def wait_applied(
    stub: admin_pb2_grpc.AdminServiceStub, accepted: Sequence[mesh_pb2.LayerPlacement]
) -> dict[int, bool]:
    """Layer → whether it got its placement. The balancer's watchdogs end every migration."""
    layers = [placement.layer for placement in accepted]
    while True:
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        now = await stub.GetPlacement(admin_pb2.GetPlacementRequest(layers=layers), timeout=TIMEOUT_S)
        slots = {placement.layer: list(placement.slots) for placement in now.layers}
        reached = {placement.layer: slots.get(placement.layer) == list(placement.slots) for placement in accepted}
        if all(reached.values()) or not (status.layers_to_apply or status.migrations):
            return reached
        await asyncio.sleep(_POLL_S)


def _print_plan(plan: admin_pb2.GetPlanResponse, out: Path | None) -> None:
    console = admin_client.console()
    if not plan.changes:
        console.print(f"view {plan.view_number}: nothing to change")
        return
    table = admin_client.table("layer", "version", "balancedness", "ranks/token", "nodes/token", "load", "MB", "gain")
    for change in plan.changes:
        worth = f"{change.gain:.3f} over noise {change.noise:.3f}"
        table.add_row(
            str(change.placement.layer),
            str(change.placement.version),
            f"{change.balancedness_before:.3f} → {change.balancedness_after:.3f}",
            f"{change.fanout_ranks_before:.2f} → {change.fanout_ranks_after:.2f}",
            f"{change.fanout_nodes_before:.2f} → {change.fanout_nodes_after:.2f}",
            str(change.slots_loaded),
            f"{change.bytes / 1e6:.2f}",
            Text(worth if change.worthwhile else f"{worth}: not worth it", style="" if change.worthwhile else "dim"),
        )
    total = sum(change.bytes for change in plan.changes) / 1e6
    console.print(f"view {plan.view_number}: {len(plan.changes)} layers, {total:.2f} MB", highlight=False)
    console.print(table)
    if out is not None:
        console.print(f"written to {out}: migrate to it with `expertmesh balancer apply {out}`", soft_wrap=True)


def _print_applied(accepted: Sequence[mesh_pb2.LayerPlacement], reached: dict[int, bool] | None, as_json: bool) -> None:
    """``reached`` None: nobody waited."""
    done = {placement.layer: None if reached is None else reached[placement.layer] for placement in accepted}
    if as_json:
        layers = [{"layer": p.layer, "version": p.version, "migrated": done[p.layer]} for p in accepted]
        admin_client.print_json({"layers": layers})
    elif not accepted:
        typer.echo("nothing to change")
    else:
        words = {None: "accepted", True: "done", False: "not migrated: see `expertmesh balancer events`"}
        for placement in accepted:
            typer.echo(f"layer {placement.layer}, version {placement.version}: {words[done[placement.layer]]}")
