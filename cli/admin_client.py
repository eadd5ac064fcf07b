"""What every `expertmesh balancer` command shares: its options, the connection, errors as one line, plain tables."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cli.addresses import balancer_address
from expertmesh.cli.connection import admin_tls, key_for
from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.client_key import key_interceptors
from expertmesh.mesh.config import TlsConfig, load_config
from expertmesh.mesh.leader import find_leader
from expertmesh.v1 import admin_pb2_grpc

BalancerOption = Annotated[
    str | None,
    typer.Option(
        "--balancer", metavar="HOST:PORT,...", help="Unset = EXPERTMESH_BALANCER, else the mesh of this folder."
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="mesh.yaml whose tls section is used to connect; unset = no TLS.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]

TIMEOUT_S = 10.0
UINT32_MAX, INT64_MAX = 2**32 - 1, 2**63 - 1
"""What fits a field of the admin API: of layers and counts, and of the numbers of events."""
_PIPE_WIDTH = 1000
_CHECK = "is the mesh running? Give another address with --balancer or EXPERTMESH_BALANCER"


def run(
    ask: Callable[[admin_pb2_grpc.AdminServiceStub], Awaitable[None]],
    balancer: str | None,
    config_file: Path | None,
) -> None:
    """
    Raises:
        typer.Exit: with 1, after a line on stderr, when the balancer does not answer or refuses.
        UserError: the address or the configuration is wrong.
    """
    addresses = balancer_address(balancer)
    config = load_config(config_file)
    tls = admin_tls(config)

    async def talk() -> None:
        leader = await find_leader(split_addresses(addresses), tls, TIMEOUT_S)
        if leader is None:
            typer.echo(f"error: none of the balancers at {addresses} leads: {_CHECK}", err=True)
            raise typer.Exit(1)
        async with _admin(leader, tls, key_for(leader, tls, config.api)) as stub:
            await ask(stub)

    try:
        asyncio.run(talk())
    except grpc.aio.AioRpcError as error:
        typer.echo(f"error: {_explain(error, addresses)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@asynccontextmanager
async def _admin(address: str, tls: TlsConfig, key: str | None) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
    async with rpc.open_channel(address, tls, role="balancer", interceptors=key_interceptors(key)) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def _explain(error: grpc.aio.AioRpcError, address: str) -> str:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        tls = ", and the TLS that it asks for with --config" if "Socket closed" in (error.details() or "") else ""
        return f"the balancer at {address} cannot be reached ({error.details()}): {_CHECK}{tls}"
    return f"the balancer at {address} answered {error.code().name}: {error.details()}"


def console() -> Console:
    """A pipe has no width to fit into."""
    made = Console()
    return made if made.is_terminal else Console(width=_PIPE_WIDTH)


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value))
