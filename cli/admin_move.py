"""``expertmesh balancer move``: one expert of one layer to another server, while the mesh serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import TIMEOUT_S, UINT32_MAX, BalancerOption, ConfigOption, JsonOption
from expertmesh.cli.admin_plan import wait_applied
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

EMPTY = -1


def move(
    layer: Annotated[int, typer.Argument(min=0, max=UINT32_MAX, help="As `balancer placement` numbers them.")],
    expert: Annotated[int, typer.Argument(min=0, help="Its id in that layer.")],
    to: Annotated[str, typer.Argument(metavar="SERVER", help="The expert server that shall hold it.")],
    source: Annotated[
        str | None, typer.Option("--from", metavar="SERVER", help="Which replica moves, where there are several.")
    ] = None,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move an expert into a free slot of SERVER, and wait until every server has switched to it.

    In mode online the balancer may move it again.
    """

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        now = await stub.GetPlacement(admin_pb2.GetPlacementRequest(layers=[layer]), timeout=TIMEOUT_S)
        if not now.layers:
            raise UserError("LAYER", f"{layer} has no placement: no view serves", "see `expertmesh balancer status`")
        before = list(now.layers[0].slots)
        old, new = slots_to_move(before, now.slot_servers, expert, to, source)
        after = [*before]
        after[new], after[old] = expert, EMPTY
        wanted = mesh_pb2.LayerPlacement(layer=layer, version=now.layers[0].version, slots=after)
        request = admin_pb2.ApplyRequest(view_number=now.view_number, layers=[wanted])
        accepted = (await stub.Apply(request, timeout=TIMEOUT_S)).accepted
        moved = (await wait_applied(stub, accepted))[layer]
        if as_json:
            ends = {"from": {"server": now.slot_servers[old], "slot": old}, "to": {"server": to, "slot": new}}
            version = {"version": accepted[0].version, "migrated": moved}
            admin_client.print_json({"layer": layer, "expert": expert, **ends, **version})
        else:
            where = f"{now.slot_servers[old]} (slot {old}) to {to} (slot {new})"
            done = f"version {accepted[0].version}" if moved else "not migrated: see `expertmesh balancer events`"
            typer.echo(f"layer {layer}, expert {expert}: {where}, {done}")
        if not moved:
            raise typer.Exit(1)

    admin_client.run(ask, balancer, config)


def slots_to_move(
    slots: Sequence[int], slot_servers: Sequence[str], expert: int, to: str, source: str | None
) -> tuple[int, int]:
    """The slot that the expert leaves and the one that it gets.

    Args:
        slots: of one layer, global slot → expert, -1 = empty.
        slot_servers: global slot → server id.
        source: which server's replica; None = there is only one.

    Raises:
        UserError: the expert or the server is unknown, is there already, or has no room.
    """
    servers = ", ".join(dict.fromkeys(slot_servers))
    for name, server in (("SERVER", to), ("--from", source)):
        if server is not None and server not in slot_servers:
            raise UserError(name, f"{server} holds no experts in this view", f"name one of {servers}")
    holders = {slot_servers[slot]: slot for slot, held in enumerate(slots) if held == expert}
    if not holders:
        raise UserError("EXPERT", f"{expert} is in no slot", f"name one from 0 to {max(slots)}")
    if to in holders:
        raise UserError("SERVER", f"{to} holds expert {expert} already", "name another one, or leave it there")
    if source is not None and source not in holders:
        raise UserError("--from", f"{source} does not hold expert {expert}", f"name one of {', '.join(holders)}")
    if source is None and len(holders) > 1:
        raise UserError(
            "EXPERT", f"{expert} has replicas on {', '.join(holders)}", "say which one moves: --from SERVER"
        )
    free = (slot for slot, held in enumerate(slots) if held == EMPTY and slot_servers[slot] == to)
    new = next(free, None)
    if new is None:
        raise UserError(
            "SERVER",
            f"{to} has no free slot in this layer",
            "move an expert of it away first, or give the mesh more slots (expert.num_slots)",
        )
    return holders[source if source is not None else next(iter(holders))], new
