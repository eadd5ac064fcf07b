"""``expertmesh balancer``: what the balancer knows, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from expertmesh.cli import (
    admin_client,
    admin_drain,
    admin_loads,
    admin_move,
    admin_plan,
    admin_record,
    admin_scale,
    admin_watch,
)
from expertmesh.cli.admin_client import INT64_MAX, TIMEOUT_S, UINT32_MAX, BalancerOption, ConfigOption, JsonOption
from expertmesh.cli.placement_plot import plot_placement
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

app = typer.Typer(no_args_is_help=True, help="Ask the balancer and steer it.")

_STATE_STYLES = {"serving": "green", "lost": "red", "broken": "red", "draining": "yellow"}


@app.command()
def status(balancer: BalancerOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The current view and every server."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        answer = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        if as_json:
            admin_client.print_json(status_as_dict(answer))
        else:
            _print_status(answer)

    admin_client.run(ask, balancer, config)


@app.command()
def placement(
    layers: Annotated[
        list[int] | None, typer.Argument(min=0, max=UINT32_MAX, help="Layers to show; none = all.")
    ] = None,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw heat maps into this PNG.")] = None,
) -> None:
    """Which expert each slot holds, layer by layer."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        answer = await stub.GetPlacement(admin_pb2.GetPlacementRequest(layers=layers or []), timeout=TIMEOUT_S)
        if plot is not None:
            plot_placement(plot, answer, await stub.GetLoads(admin_pb2.GetLoadsRequest(), timeout=TIMEOUT_S))
        if as_json:
            admin_client.print_json(placement_as_dict(answer))
        else:
            _print_placement(answer)

    admin_client.run(ask, balancer, config)


@app.command()
def events(
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    after: Annotated[int, typer.Option(min=0, max=INT64_MAX, help="Only events with a greater number.")] = 0,
    limit: Annotated[int, typer.Option(min=0, max=UINT32_MAX, help="The newest so many; 0 = all that are kept.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones as they happen.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """What happened to the mesh."""
    console = Console()

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        request = admin_pb2.ListEventsRequest(after=after, limit=limit, follow=follow)
        async for event in stub.ListEvents(request, timeout=None if follow else TIMEOUT_S):
            if as_json:
                typer.echo(json.dumps(event_as_dict(event)))
            else:
                when = datetime.fromtimestamp(event.unix_s).strftime("%H:%M:%S.%f")[:-3]
                line = Text(f"{event.number:>5} {when} ", style="dim")
                line.append(f"{event.kind:<20} ", style="bold").append(f"{event.subject}: {event.message}", style="")
                console.print(line, soft_wrap=True)

    admin_client.run(ask, balancer, config)


app.command()(admin_loads.loads)
app.command()(admin_plan.plan)
app.command()(admin_plan.apply)
app.command()(admin_move.move)
app.command()(admin_plan.mode)
app.command()(admin_scale.add)
app.command()(admin_drain.drain)
app.command()(admin_scale.scale)
app.command()(admin_record.record)
app.command()(admin_watch.watch)


def status_as_dict(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """The contract of ``status --json``."""
    return {
        "view": status.view_number,
        "serving": status.serving,
        "reason": status.reason,
        "servers": [
            {
                "id": server.server_id,
                "role": role_of(server),
                "state": state_of(server),
                "pid": server.pid,
                "address": server.address,
                "node": server.node,
                "num_slots": server.num_slots,
                "rank": server.rank if server.HasField("rank") else None,
                "incarnation": server.incarnation,
                "last_heartbeat_s": round(server.last_heartbeat_s, 3),
            }
            for server in status.servers
        ],
        "model": status.model.name,
        "model_shape": {
            "family": status.model.family,
            "num_experts": status.model.num_experts,
            "moe_layers": list(status.model.moe_layers),
            "bytes_per_expert": status.model.bytes_per_expert,
        },
        "balancer": admin_watch.balancer_as_dict(status),
        "num_slots": status.num_slots,
        "scale": admin_scale.scale_as_dict(status),
        "page": status.page or None,
    }


def placement_as_dict(placement: admin_pb2.GetPlacementResponse) -> dict[str, Any]:
    """The contract of ``placement --json``. ``quotas``: attention server → share of its rows for each expert server, in
    the order of their slots; who is not named sends all of them equally much."""
    ranks = list(placement.slot_servers)
    return {
        "view": placement.view_number,
        "layers": [
            {
                "layer": layer.layer,
                "version": layer.version,
                "slots": list(layer.slots),
                "ranks": ranks,
                "quotas": {quota.server_id: list(quota.rank_share) for quota in layer.source_quotas},
            }
            for layer in placement.layers
        ],
    }


def event_as_dict(event: admin_pb2.ListEventsResponse) -> dict[str, Any]:
    return {
        "number": event.number,
        "time": datetime.fromtimestamp(event.unix_s, UTC).isoformat(timespec="milliseconds"),
        "kind": event.kind,
        "subject": event.subject,
        "message": event.message,
    }


def _print_status(status: admin_pb2.GetStatusResponse) -> None:
    console = admin_client.console()
    serving = "[green]serving[/]" if status.serving else "[yellow]not serving[/]"
    reason = f": {status.reason}" if status.reason else ""
    console.print(f"view {status.view_number}, {serving}{reason}", soft_wrap=True, highlight=False)
    model = status.model
    if model.num_experts:
        console.print(
            f"model {model.name}: {model.num_experts} experts in each of {len(model.moe_layers)} MoE layers; "
            f"{status.num_slots} slots a layer; balancer mode {status.balancer_mode}, migrations: "
            f"{len(status.migrations)} under way, {status.migrations_committed} committed, "
            f"{status.migrations_aborted} given up",
            soft_wrap=True,
            highlight=False,
        )
    console.print(admin_scale.scale_line(status), soft_wrap=True, highlight=False)
    if status.page:
        console.print(f"page {status.page}", soft_wrap=True, highlight=False)
    table = admin_client.table("server", "role", "state", "rank", "pid", "address", "node", "slots", "seen")
    for server in status.servers:
        state = state_of(server)
        table.add_row(
            server.server_id,
            role_of(server),
            Text(state, style=_STATE_STYLES.get(state, "")),
            str(server.rank) if server.HasField("rank") else "-",
            str(server.pid),
            server.address or "-",
            server.node,
            str(server.num_slots) if server.num_slots else "-",
            f"{server.last_heartbeat_s:.1f} s",
        )
    console.print(table)


def _print_placement(placement: admin_pb2.GetPlacementResponse) -> None:
    """A row a layer, a column a server; replicas are not marked: the same number in two columns is one."""
    console = admin_client.console()
    if not placement.layers:
        console.print("no view: no placement")
        return
    servers = list(dict.fromkeys(placement.slot_servers))
    width = len(placement.slot_servers) // len(servers)
    console.print(f"view {placement.view_number}: experts by server")
    table = admin_client.table("layer", "version", *servers)
    for layer in placement.layers:
        rows = [layer.slots[first : first + width] for first in range(0, len(layer.slots), width)]
        table.add_row(str(layer.layer), str(layer.version), *(_ranges(row) for row in rows))
    console.print(table)


def _ranges(slots: Iterable[int]) -> str:
    """Experts in ascending order, runs as ``a-b``: '0-10 14'."""
    runs: list[list[int]] = []
    for expert in sorted(expert for expert in slots if expert >= 0):
        if runs and expert == runs[-1][1] + 1:
            runs[-1][1] = expert
        else:
            runs.append([expert, expert])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"


def role_of(server: admin_pb2.ServerStatus) -> str:
    return mesh_pb2.Role.Name(server.role).removeprefix("ROLE_").lower()


def state_of(server: admin_pb2.ServerStatus) -> str:
    return mesh_pb2.ServerState.Name(server.state).removeprefix("SERVER_STATE_").lower()
