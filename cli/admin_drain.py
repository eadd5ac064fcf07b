"""``expertmesh balancer drain``: a server leaves the mesh, no request fails."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import TIMEOUT_S, BalancerOption, ConfigOption, JsonOption
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

_POLL_S = 0.1


def drain(
    server: Annotated[str, typer.Argument(help="Its id, as `status` shows it.")],
    force: Annotated[bool, typer.Option("--force", help="Even if nothing can be served without it.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds to wait until it has left; 0 = do not wait.")
    ] = 60.0,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a server to finish what it holds and to leave; its process then ends with 0.

    The others go on in a view without it, and no request fails. Exit status 1 when it has not left in time.
    """

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        started_s = time.monotonic()
        await stub.Drain(admin_pb2.DrainRequest(server_id=server, force=force), timeout=TIMEOUT_S)
        left = await _wait_left(stub, server, timeout_s) if timeout_s else None
        seconds = round(time.monotonic() - started_s, 3)
        if as_json:
            admin_client.print_json({"server": server, "left": left, "seconds": seconds})
        elif left is None:
            typer.echo(f"{server} was asked to leave")
        else:
            typer.echo(
                f"{server} left after {seconds:.1f} s" if left else f"{server} is still there after {seconds:.0f} s"
            )
        if left is False:
            raise typer.Exit(1)

    admin_client.run(ask, balancer, config)


async def _wait_left(stub: admin_pb2_grpc.AdminServiceStub, server: str, timeout_s: float) -> bool:
    """Until the server is gone and the others serve."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        there = any(s.server_id == server and s.state != mesh_pb2.SERVER_STATE_LOST for s in status.servers)
        can_serve = any(s.role != mesh_pb2.ROLE_ROUTER for s in status.servers)
        if not there and (status.serving or not can_serve):
            return True
        await asyncio.sleep(_POLL_S)
    return False
