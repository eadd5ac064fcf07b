"""``expertmesh top``: what the mesh does now, as a console that lives or as JSON.

All of it comes from the balancer: servers tell it what they do with each heartbeat, so neither Prometheus nor /metrics
is needed. Rates are what counters grew by between two looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from expertmesh.cli import admin_client
from expertmesh.cli.admin import role_of, state_of
from expertmesh.cli.admin_client import TIMEOUT_S, BalancerOption, ConfigOption, JsonOption
from expertmesh.cli.admin_watch import balancer_as_dict, event_line
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

_EVENTS_SHOWN = 5
_BAR_WIDTH = 20
_ROUTER, _HAS_ATTENTION = mesh_pb2.ROLE_ROUTER, (mesh_pb2.ROLE_ATTENTION, mesh_pb2.ROLE_BOTH)


def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks; rates are over them.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Two looks, one answer.")] = False,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rates, queues, latencies, load by rank, balancedness and migrations, as they change."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        console = Top(stub)
        await console.look()
        if once:
            await asyncio.sleep(interval)
            await console.look()
            if as_json:
                admin_client.print_json(console.as_dict())
            else:
                admin_client.console().print(console.as_table())
        elif as_json:
            await _repeat(console, interval, lambda: admin_client.print_json(console.as_dict()))
        else:
            with Live(console=admin_client.console(), auto_refresh=False, screen=True) as live:
                await _repeat(console, interval, lambda: live.update(console.as_table(), refresh=True))

    admin_client.run(ask, balancer, config)


async def _repeat(console: Top, interval_s: float, show: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        await console.look()
        show()


@dataclass(frozen=True, slots=True)
class Look:
    """What the balancer said at a moment of the monotonic clock."""

    at_s: float
    status: admin_pb2.GetStatusResponse
    loads: admin_pb2.GetLoadsResponse

    def loads_of(self, *roles: mesh_pb2.Role.ValueType) -> dict[tuple[str, str], mesh_pb2.ServerLoad]:
        """Server id and incarnation → its last heartbeat's load."""
        return {
            (server.server_id, server.incarnation): server.load
            for server in self.status.servers
            if server.role in roles and server.HasField("load") and server.state != mesh_pb2.SERVER_STATE_LOST
        }


class Top:
    """The last two looks, and the newest events."""

    def __init__(self, stub: admin_pb2_grpc.AdminServiceStub, clock: Callable[[], float] = time.monotonic) -> None:
        self._stub = stub
        self._clock = clock
        self._before: Look | None = None
        self._now = Look(0.0, admin_pb2.GetStatusResponse(), admin_pb2.GetLoadsResponse())
        self._events: list[admin_pb2.ListEventsResponse] = []
        self._ttft_s: float | None = None
        self._tpot_s: float | None = None

    async def look(self) -> None:
        stub, at_s = self._stub, self._clock()
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        loads = await stub.GetLoads(admin_pb2.GetLoadsRequest(), timeout=TIMEOUT_S)
        request = admin_pb2.ListEventsRequest(limit=_EVENTS_SHOWN)
        self._events = [event async for event in stub.ListEvents(request, timeout=TIMEOUT_S)]
        if self._now.at_s:
            self._before = self._now
        self._now = Look(at_s, status, loads)
        self._ttft_s = _mean([load.ttft_s for load in self._now.loads_of(_ROUTER).values()]) or self._ttft_s
        self._tpot_s = _mean([load.token_s for load in self._now.loads_of(*_HAS_ATTENTION).values()]) or self._tpot_s

    def as_dict(self) -> dict[str, Any]:
        """The contract of ``top --json``. Seconds are means, null before there was any; ``load`` of an expert rank is
        its share of all rows times the number of ranks, 1 = as much as the mean."""
        status, loads = self._now.status, self._now.loads
        routers, attention = self._now.loads_of(_ROUTER), self._now.loads_of(*_HAS_ATTENTION)
        counted = [layer for layer in loads.layers if layer.tokens]
        visited = [layer for layer in counted if layer.fanout_ranks]
        return {
            "view": status.view_number,
            "serving": status.serving,
            "reason": status.reason,
            "model": status.model.name,
            "rates": {
                "requests_per_s": self._rate("requests_ended", _ROUTER),
                "failed_per_s": self._rate("requests_failed", _ROUTER),
                "prompt_tokens_per_s": self._rate("prompt_tokens", *_HAS_ATTENTION),
                "generation_tokens_per_s": self._rate("generation_tokens", *_HAS_ATTENTION),
            },
            "requests": {
                "in_routers": sum(load.num_requests_running for load in routers.values()),
                "without_server": sum(load.num_requests_waiting for load in routers.values()),
                "running": sum(load.num_requests_running for load in attention.values()),
                "waiting": sum(load.num_requests_waiting for load in attention.values()),
            },
            "ttft_s": self._ttft_s,
            "tpot_s": self._tpot_s,
            "kv_cache_usage": max((round(load.kv_cache_usage, 4) for load in attention.values()), default=0.0),
            "balancedness": _over([layer.balancedness for layer in counted]),
            "fanout_ranks": _over([layer.fanout_ranks for layer in visited]),
            "fanout_nodes": _over([layer.fanout_nodes for layer in visited]),
            "servers": [self._server_as_dict(server) for server in status.servers],
            "balancer": balancer_as_dict(status),
        }

    def _server_as_dict(self, server: admin_pb2.ServerStatus) -> dict[str, Any]:
        load = server.load
        return {
            "id": server.server_id,
            "role": role_of(server),
            "state": state_of(server),
            "running": load.num_requests_running,
            "waiting": load.num_requests_waiting,
            "kv_cache_usage": round(load.kv_cache_usage, 4),
            "generation_tokens_per_s": self._rate("generation_tokens", server.role, only=server.server_id),
            "tpot_s": load.token_s or None,
            "load": self._rank_loads().get(server.server_id),
        }

    def _rank_loads(self) -> dict[str, float]:
        """Expert server → its load over all layers / the mean; empty before tokens were counted."""
        loads = self._now.loads
        totals = [sum(layer.rank_load[rank] for layer in loads.layers) for rank in range(len(loads.expert_servers))]
        mean = _mean(totals)
        return {
            server: round(total / mean, 3) if mean else 0.0
            for server, total in zip(loads.expert_servers, totals, strict=True)
        }

    def _rate(self, counter: str, *roles: mesh_pb2.Role.ValueType, only: str = "") -> float | None:
        """A second, over the servers of these roles; a process that is new counts from 0. None before two looks."""
        if self._before is None:
            return None
        before, grown = self._before.loads_of(*roles), 0
        for key, load in self._now.loads_of(*roles).items():
            if not only or key[0] == only:
                grown += getattr(load, counter) - (getattr(before[key], counter) if key in before else 0)
        return round(grown / max(self._now.at_s - self._before.at_s, 1e-9), 3)

    # -- for people -----------------------------------------------------------------------------------------------

    def as_table(self) -> RenderableType:
        shown = self.as_dict()
        state = "serving" if shown["serving"] else f"not serving: {shown['reason']}"
        rates, requests = shown["rates"], shown["requests"]
        lines = [
            f"{shown['model'] or 'no model'}, view {shown['view']}, {state}",
            f"requests  {_number(rates['requests_per_s'])} ended/s, {_number(rates['failed_per_s'])} failed/s; "
            f"{requests['running']} running, {requests['waiting']} waiting, "
            f"{requests['without_server']} without a server",
            f"tokens    {_number(rates['generation_tokens_per_s'])} generated/s, "
            f"{_number(rates['prompt_tokens_per_s'])} of prompts/s; TTFT {_milliseconds(shown['ttft_s'])}, "
            f"TPOT {_milliseconds(shown['tpot_s'])}; KV cache {shown['kv_cache_usage']:.0%}",
            f"experts   balancedness {_range(shown['balancedness'])}, ranks/token {_range(shown['fanout_ranks'])}, "
            f"nodes/token {_range(shown['fanout_nodes'])}",
            self._migrations_line(shown["balancer"]),
        ]
        head = [Text(line, style="bold" if number == 0 else "") for number, line in enumerate(lines)]
        return Group(*head, Text(), self._servers(shown["servers"]), Text(), *map(event_line, self._events))

    @staticmethod
    def _migrations_line(balancer: dict[str, Any]) -> str:
        running = [
            f"layer {migration['layer']} {migration['phase']} {migration['ranks_done']}/{migration['num_ranks']}"
            for migration in balancer["migrations"]
        ]
        return (
            f"placement mode {balancer['mode']}; migrations {balancer['migrations_committed']} committed, "
            f"{balancer['migrations_aborted']} given up; now {', '.join(running) or 'none'}"
        )

    @staticmethod
    def _servers(servers: list[dict[str, Any]]) -> RenderableType:
        table = admin_client.table("server", "role", "state", "running", "waiting", "KV", "tokens/s", "TPOT", "load")
        for server in servers:
            has_attention = server["role"] in ("attention", "both")
            load = server["load"]
            bar = "" if load is None else "█" * min(_BAR_WIDTH, round(load * _BAR_WIDTH / 2))
            table.add_row(
                server["id"],
                server["role"],
                Text(server["state"], style="green" if server["state"] == "serving" else "yellow"),
                str(server["running"]) if server["role"] != "expert" else "-",
                str(server["waiting"]) if server["role"] != "expert" else "-",
                f"{server['kv_cache_usage']:.0%}" if has_attention else "-",
                _number(server["generation_tokens_per_s"]) if has_attention else "-",
                _milliseconds(server["tpot_s"]) if has_attention else "-",
                "-" if load is None else f"{load:.2f} {bar}",
            )
        return table


def _mean(values: list[float]) -> float | None:
    """Of those that are known (not 0)."""
    known = [value for value in values if value]
    return sum(known) / len(known) if known else None


def _over(values: list[float]) -> dict[str, float] | None:
    """The mean, the least and the greatest over the layers."""
    if not values:
        return None
    return {"mean": round(sum(values) / len(values), 6), "min": round(min(values), 6), "max": round(max(values), 6)}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _range(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['mean']:.3f} ({values['min']:.3f} … {values['max']:.3f})"
