"""``expertmesh balancer watch``: a table that lives: balance and fan-out of each layer, heat of ranks, migrations."""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import TIMEOUT_S, BalancerOption, ConfigOption, JsonOption
from expertmesh.cli.admin_loads import heat, loads_as_dict
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

_EVENTS_SHOWN = 8
_BALANCED, _SKEWED = 0.95, 0.8


def watch(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Looks; 0 = until Ctrl-C.")] = 0,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Balancedness, fan-out and heat of ranks by layer, and the migrations in flight, as they change."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        watching = Watching(stub)
        if as_json:
            await _repeat(watching, interval, count, lambda: admin_client.print_json(watching.as_dict()))
            return
        with Live(console=admin_client.console(), auto_refresh=False) as live:
            await _repeat(watching, interval, count, lambda: live.update(watching.as_table(), refresh=True))

    admin_client.run(ask, balancer, config)


async def _repeat(watching: Watching, interval_s: float, count: int, show: Any) -> None:
    looks = 0
    while True:
        await watching.look()
        show()
        looks += 1
        if looks == count:
            return
        await asyncio.sleep(interval_s)


class Watching:
    """What was seen at the last look, and the events up to it."""

    def __init__(self, stub: admin_pb2_grpc.AdminServiceStub) -> None:
        self._stub = stub
        self._status = admin_pb2.GetStatusResponse()
        self._loads = admin_pb2.GetLoadsResponse()
        self._versions: dict[int, int] = {}
        self._events = deque[admin_pb2.ListEventsResponse](maxlen=_EVENTS_SHOWN)

    async def look(self) -> None:
        stub = self._stub
        self._status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        self._loads = await stub.GetLoads(admin_pb2.GetLoadsRequest(), timeout=TIMEOUT_S)
        placement = await stub.GetPlacement(admin_pb2.GetPlacementRequest(), timeout=TIMEOUT_S)
        self._versions = {layer.layer: layer.version for layer in placement.layers}
        after = self._events[-1].number if self._events else 0
        request = admin_pb2.ListEventsRequest(after=after, limit=_EVENTS_SHOWN)
        async for event in stub.ListEvents(request, timeout=TIMEOUT_S):
            self._events.append(event)

    def as_dict(self) -> dict[str, Any]:
        """A line of ``watch --json``."""
        return {
            "view": self._status.view_number,
            "serving": self._status.serving,
            "balancer": balancer_as_dict(self._status),
            "versions": {str(layer): version for layer, version in self._versions.items()},
            **loads_as_dict(self._loads),
        }

    def as_table(self) -> RenderableType:
        status = self._status
        head = Text(f"view {status.view_number}, ", style="bold")
        head.append("serving" if status.serving else f"not serving: {status.reason}")
        head.append(
            f"; mode {status.balancer_mode}, {status.layer_updates_per_iter} layers at a time; migrations: "
            f"{status.migrations_committed} committed, {status.migrations_aborted} given up"
        )
        servers = Text(f"rank bars: {' '.join(self._loads.expert_servers)}", style="dim")
        return Group(head, servers, self._layers(), *self._event_lines())

    def _layers(self) -> RenderableType:
        running = {migration.layer: migration for migration in self._status.migrations}
        table = admin_client.table("layer", "version", "tokens", "balancedness", "ranks/token", "ranks", "migration")
        for layer in self._loads.layers:
            balancedness = layer.balancedness
            style = "green" if balancedness >= _BALANCED else "yellow" if balancedness >= _SKEWED else "red"
            table.add_row(
                str(layer.layer),
                str(self._versions.get(layer.layer, "-")),
                f"{layer.tokens:.0f}",
                Text(f"{balancedness:.3f}", style=style if layer.tokens else "dim"),
                f"{layer.fanout_ranks:.2f}" if layer.fanout_ranks else "-",
                heat(layer.rank_load),
                _migration(running[layer.layer]) if layer.layer in running else "",
            )
        return table

    def _event_lines(self) -> list[Text]:
        return [event_line(event) for event in self._events]


def event_line(event: admin_pb2.ListEventsResponse) -> Text:
    """When and what, in one line however narrow the terminal is."""
    when = datetime.fromtimestamp(event.unix_s).strftime("%H:%M:%S")
    line = Text(f"{when} ", style="dim", no_wrap=True, overflow="ellipsis")
    return line.append(f"{event.kind} {event.subject}: {event.message}", style="")


def balancer_as_dict(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """What ``status --json`` says under ``balancer``."""
    return {
        "mode": status.balancer_mode,
        "layer_updates_per_iter": status.layer_updates_per_iter,
        "mesh_id": status.mesh_id,
        "uptime_s": round(status.uptime_s, 3),
        "migrations_committed": status.migrations_committed,
        "migrations_aborted": status.migrations_aborted,
        "layers_to_apply": status.layers_to_apply,
        "migrations": [
            {
                "id": migration.id,
                "layer": migration.layer,
                "version": migration.version,
                "phase": migration.phase,
                "phase_s": round(migration.phase_s, 3),
                "slots_loaded": migration.slots_loaded,
                "ranks_done": migration.ranks_done,
                "num_ranks": migration.num_ranks,
            }
            for migration in status.migrations
        ],
    }


def _migration(migration: admin_pb2.RunningMigration) -> str:
    done = f"{migration.ranks_done}/{migration.num_ranks} ranks"
    return f"→ {migration.version} {migration.phase} {migration.phase_s:.1f} s, {done}, {migration.slots_loaded} slots"
