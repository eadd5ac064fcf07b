"""``expertmesh balancer record``: token-level routing of live traffic into a trace file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import numpy.typing as npt
import typer

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import BalancerOption, ConfigOption, JsonOption
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

MAX_TOKENS = 10_000_000


def record(
    out: Annotated[
        Path, typer.Option("--out", metavar="TRACE.npz", help="Where the trace goes; an old one is replaced.")
    ],
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=MAX_TOKENS, help="Over all attention servers.")
    ] = 10_000,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=0.1, help="Seconds; unset = until a minute without traffic.")
    ] = None,
    balancer: BalancerOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record which experts the next tokens choose, layer by layer; `expertmesh simulate` reads it."""
    _check(out)

    async def ask(stub: admin_pb2_grpc.AdminServiceStub) -> None:
        trace = _Trace()
        try:
            async for part in stub.Record(admin_pb2.RecordRequest(max_tokens=tokens), timeout=timeout_s):
                if part.num_tokens:
                    trace.add(part)
                else:
                    typer.echo(f"{part.server_id} records", err=True)
        except grpc.aio.AioRpcError as error:
            if not trace.num_tokens:
                _explain_silence(error)
                raise
            if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:  # else the time is up
                typer.echo(f"warning: the recording broke off: {error.details()}", err=True)
        trace.write(out)
        if as_json:
            admin_client.print_json({"file": str(out), "tokens": trace.num_tokens, "layers": trace.layers})
            return
        few = "" if trace.num_tokens == tokens else f" of {tokens}"
        typer.echo(f"{out}: {trace.num_tokens}{few} tokens, {len(trace.layers)} layers")

    admin_client.run(ask, balancer, config)


class _Trace:
    """The parts of a recording, in the order in which they came."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.num_tokens = 0
        self._num_experts = 0
        self._parts_LTK: list[npt.NDArray[np.int16]] = []

    def add(self, part: admin_pb2.RecordResponse) -> None:
        self.layers, self._num_experts = list(part.layers), part.num_experts
        self.num_tokens += part.num_tokens
        shape = len(part.layers), part.num_tokens, part.top_k
        self._parts_LTK.append(np.frombuffer(part.topk, "<i2").reshape(shape).astype(np.int16))

    def write(self, out: Path) -> None:
        """Readers see the old file or the whole new one.

        Raises:
            UserError: the file cannot be written.
        """
        topk_LTK = np.concatenate(self._parts_LTK, axis=1)
        part = out.with_name(out.name + ".part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, num_experts=np.int64(self._num_experts), topk=topk_LTK)
            part.replace(out)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(
                "--out", f"{out} cannot be written ({error.strerror})", "free space or name another"
            ) from None


def _check(out: Path) -> None:
    """
    Raises:
        UserError: before anything is recorded, where the trace could not be kept.
    """
    if out.suffix != ".npz":
        raise UserError("--out", f"{out} does not end in .npz", "name the trace TRACE.npz")
    if not out.parent.is_dir():
        raise UserError("--out", f"the folder {out.parent} does not exist", "make it, or name another")
    if out.is_dir():
        raise UserError("--out", f"{out} is a folder", "name a file")


def _explain_silence(error: grpc.aio.AioRpcError) -> None:
    """A deadline that ran out is no sign of an unreachable balancer here.

    Raises:
        typer.Exit: with 1, after a line on stderr.
    """
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        typer.echo(
            "error: no token came within the time; send requests meanwhile, or give a longer --timeout", err=True
        )
        raise typer.Exit(1)
