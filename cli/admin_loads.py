"""``expertmesh balancer loads``: what the experts and the ranks carry, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import TIMEOUT_S, BalancerOption, ConfigOption, JsonOption
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

_HEAT = " ▁▂▃▄▅▆▇█"
_HEAT_WIDTH = 64  # columns; more experts share one


def loads(balancer: BalancerOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Load of each expert and rank, balancedness and fan-out, decayed."""

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        answer = await stub.GetLoads(admin_pb2.GetLoadsRequest(), timeout=TIMEOUT_S)
        if as_json:
            admin_client.print_json(loads_as_dict(answer))
        else:
            _print_loads(answer)

    admin_client.run(ask, balancer, config)


def loads_as_dict(loads: admin_pb2.GetLoadsResponse) -> dict[str, Any]:
    """The contract of ``loads --json``."""
    return {
        "servers": list(loads.expert_servers),
        "layers": [
            {
                "layer": layer.layer,
                "load": [round(load, 3) for load in layer.load],
                "balancedness": round(layer.balancedness, 6),
                "fanout_ranks": round(layer.fanout_ranks, 6),
                "fanout_nodes": round(layer.fanout_nodes, 6),
                "tokens": round(layer.tokens, 3),
                "rank_load": [round(load, 3) for load in layer.rank_load],
            }
            for layer in loads.layers
        ],
    }


def heat(values: Sequence[float], width: int = _HEAT_WIDTH) -> str:
    """One bar a value, or a few values, as high as the greatest at most; anything above nothing can be seen."""
    size = -(-len(values) // width)
    sums = [sum(values[first : first + size]) for first in range(0, len(values), size)]
    largest = max(sums, default=0.0)
    return "".join(_HEAT[max(1, round(value / largest * (len(_HEAT) - 1))) if value else 0] for value in sums)


def _print_loads(loads: admin_pb2.GetLoadsResponse) -> None:
    console = admin_client.console()
    if not loads.layers:
        console.print("no view: no loads")
        return
    if not any(layer.tokens for layer in loads.layers):
        console.print("no tokens were counted yet: send requests, and ask again a few seconds later")
    console.print(f"rank bars: {' '.join(loads.expert_servers)}", soft_wrap=True, highlight=False)
    table = admin_client.table("layer", "tokens", "balancedness", "ranks/token", "nodes/token", "ranks", "experts")
    for layer in loads.layers:
        visited = layer.fanout_ranks > 0
        table.add_row(
            str(layer.layer),
            f"{layer.tokens:.0f}",
            f"{layer.balancedness:.3f}",
            f"{layer.fanout_ranks:.2f}" if visited else "-",
            f"{layer.fanout_nodes:.2f}" if visited else "-",
            Text(heat(layer.rank_load)),
            Text(heat(layer.load)),
        )
    console.print(table)
