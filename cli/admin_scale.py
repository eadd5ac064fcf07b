"""``expertmesh balancer add`` and ``scale``: how many servers of each role there should be."""

from __future__ import annotations

import asyncio
import enum
import time
from typing import Annotated, Any

import typer

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import TIMEOUT_S, UINT32_MAX, BalancerOption, ConfigOption, JsonOption
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

_POLL_S = 0.1
NOBODY = "no launcher watches the scale: start the servers yourself (expertmesh serve ROLE), or let it start them"


class ScaledRole(enum.StrEnum):
    ATTENTION = "attention"
    EXPERT = "expert"
    BOTH = "both"

    @property
    def number(self) -> mesh_pb2.Role.ValueType:
        return mesh_pb2.Role.Value(f"ROLE_{self.name}")


def add(
    role: Annotated[ScaledRole, typer.Argument(help="attention, expert or both.")],
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="So many servers.")] = 1,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until they serve.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait.")] = 60.0,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Raise the number of servers that there should be; a launcher that watches it (`expertmesh up`) starts them.

    Refused when somebody else changes it at the same time. Exit status 1 when they do not serve in time.
    """

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        before = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        target = _of(before.scale, role).target + count
        await _set(stub, role, target, before, wait, timeout_s, as_json)

    admin_client.run(ask, balancer, config)


def scale(
    role: Annotated[ScaledRole | None, typer.Argument(help="attention, expert or both.")] = None,
    target: Annotated[
        int | None, typer.Argument(min=0, max=UINT32_MAX, help="So many servers there should be.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until they serve.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait.")] = 60.0,
    launcher: Annotated[
        str | None,
        typer.Option("--watch", metavar="NAME", help="Watch as the launcher NAME: a line now and after every change."),
    ] = None,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """How many servers there should be and how many there are; with ROLE and TARGET, change it.

    It is lowered below what is there by `drain`, which says which server goes.
    """
    if (role is None) != (target is None):
        raise typer.BadParameter("give ROLE and TARGET, or none of them")

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        if launcher is not None:
            await _watch(stub, launcher, as_json)
            return
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        if role is not None and target is not None:
            await _set(stub, role, target, status, wait, timeout_s, as_json)
        elif as_json:
            admin_client.print_json(scale_as_dict(status))
        else:
            typer.echo(scale_line(status))

    admin_client.run(ask, balancer, config)


async def _set(
    stub: admin_pb2_grpc.AdminServiceStub,
    role: ScaledRole,
    target: int,
    before: admin_pb2.GetStatusResponse,
    wait: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    started_s = time.monotonic()
    request = admin_pb2.SetScaleRequest(version=before.scale.version, role=role.number, target=target)
    answer = await stub.SetScale(request, timeout=TIMEOUT_S)
    if not before.launchers:
        typer.echo(f"note: {NOBODY}", err=True)
    after = await _wait_serving(stub, role, target, timeout_s) if wait else None
    known = {server.server_id for server in before.servers}
    servers = after.servers if after is not None else ()
    added = [s.server_id for s in servers if s.role == role.number and s.server_id not in known]
    serving = None if after is None else _is_serving(after, role, target)
    seconds = round(time.monotonic() - started_s, 3)
    if as_json:
        fields = {"role": role.value, "target": target, "version": answer.scale.version, "added": added}
        admin_client.print_json({**fields, "serving": serving, "seconds": seconds})
    elif serving is None:
        typer.echo(f"{target} {role.value} servers there should be")
    elif serving:
        typer.echo(f"{target} {role.value} servers serve after {seconds:.1f} s: new are {', '.join(added) or 'none'}")
    else:
        there = 0 if after is None else _of(after.scale, role).serving
        typer.echo(f"{there} of {target} {role.value} servers serve after {seconds:.0f} s")
    if serving is False:
        raise typer.Exit(1)


async def _watch(stub: admin_pb2_grpc.AdminServiceStub, launcher: str, as_json: bool) -> None:
    """Until the balancer ends or Ctrl-C."""
    async for response in stub.WatchScale(admin_pb2.WatchScaleRequest(launcher=launcher)):
        if as_json:
            admin_client.print_json({"version": response.scale.version, "roles": _roles(response.scale)})
        else:
            typer.echo(", ".join(f"{entry.target} {_name(entry)}" for entry in response.scale.roles))


async def _wait_serving(
    stub: admin_pb2_grpc.AdminServiceStub, role: ScaledRole, target: int, timeout_s: float
) -> admin_pb2.GetStatusResponse:
    """The status when so many serve, or when the time is up."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
        if _is_serving(status, role, target) or time.monotonic() >= deadline_s:
            return status
        await asyncio.sleep(_POLL_S)


def _is_serving(status: admin_pb2.GetStatusResponse, role: ScaledRole, target: int) -> bool:
    return status.serving and _of(status.scale, role).serving >= target


def _of(scale: admin_pb2.Scale, role: ScaledRole) -> admin_pb2.RoleScale:
    return next((entry for entry in scale.roles if entry.role == role.number), admin_pb2.RoleScale(role=role.number))


def scale_as_dict(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """``scale --json``, and a part of ``status --json``."""
    return {
        "version": status.scale.version,
        "policy": status.scale_policy,
        "launchers": list(status.launchers),
        "roles": _roles(status.scale),
    }


def _roles(scale: admin_pb2.Scale) -> dict[str, dict[str, int]]:
    return {
        _name(entry): {"target": entry.target, "servers": entry.servers, "serving": entry.serving}
        for entry in scale.roles
    }


def scale_line(status: admin_pb2.GetStatusResponse) -> str:
    """For people: what there is of what there should be."""
    roles = [f"{entry.serving} of {entry.target} {_name(entry)}" for entry in status.scale.roles]
    launchers = f"started by {', '.join(status.launchers)}" if status.launchers else "no launcher watches"
    return f"servers: {', '.join(roles)}; {launchers}; scale policy {status.scale_policy}"


def _name(entry: admin_pb2.RoleScale) -> str:
    return mesh_pb2.Role.Name(entry.role).removeprefix("ROLE_").lower()
