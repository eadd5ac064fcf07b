"""``expertmesh up``: a whole mesh on this machine, alone or around a command."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from expertmesh.cli.addresses import RUN_FILE
from expertmesh.cli.connection import admin_tls
from expertmesh.cli.local_errors import MeshFailedError, MeshInterruptedError
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.preflight import check_before_start
from expertmesh.cli.progress import Progress, progress_for
from expertmesh.cli.signals import SignalWatch
from expertmesh.cli.state_dir import RunFile, StateDir
from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.client_key import key_from_environment, key_interceptors
from expertmesh.mesh.config import MeshConfig, load_config, parse_config
from expertmesh.mesh.leader import find_leader
from expertmesh.mesh.model.hub import is_repo
from expertmesh.mesh.model.spec import checkpoint_folder
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
PAGE_TIMEOUT_S = 2.0
EXIT_NO_COMMAND = 127
COMMAND_GRACE_S = 5.0
"""How long COMMAND may take to end after the signal that ends `up`."""


def up(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND ...]", help="Run beside the mesh, then stop the mesh.")
    ] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="mesh.yaml; unset = every default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder, or ORGANISATION/NAME on its hub; unset = the demo model.")
    ] = None,
    attention: Annotated[int | None, typer.Option(help="Attention servers.")] = None,
    experts: Annotated[int | None, typer.Option(help="Expert servers.")] = None,
    both: Annotated[
        int | None, typer.Option(help="Colocated servers; alone, it sets --attention and --experts to 0.")
    ] = None,
    routers: Annotated[int | None, typer.Option(help="Routers, all at one address.")] = None,
    num_slots: Annotated[int | None, typer.Option(help="Slots a layer, over all servers.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    port: Annotated[int | None, typer.Option(help="The router's port; 0 = any free port.")] = None,
    page: Annotated[
        bool, typer.Option(help="Serve a web page of the live mesh, on a free port if none is set.")
    ] = True,
) -> None:
    """Start a local mesh and print `router listening on HOST:PORT` when it can serve.

    Without COMMAND it serves until Ctrl-C or SIGTERM. With COMMAND it runs it with EXPERTMESH_ROUTER,
    EXPERTMESH_BALANCER and EXPERTMESH_HTTP (a URL: the OpenAI-compatible API is below it, at /v1) set, then stops the
    mesh and exits with the command's status.
    """
    overrides: dict[str, Any] = {
        "model.repo" if model is not None and is_repo(model) else "model.path": model,
        "model.dtype": dtype,
        "attention.servers": 0 if both and attention is None else attention,
        "expert.servers": 0 if both and experts is None else experts,
        "expert.num_slots": num_slots,
        "both_servers": both,
        "router.servers": routers,
        "router.port": port,
    }
    config = load_config(config_file)
    if model is not None:
        config = _with_model(config, path=None, repo=None, revision=None)
    if page and config.balancer.page_port is None:
        overrides["balancer.page_port"] = 0
    config = with_overrides(config, overrides)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if config.model.repo is not None:  # fetched once, before services wait for each other
        name = config.model.name or config.model.repo
        config = _with_model(config, path=checkpoint_folder(config.model), repo=None, revision=None, name=name)
    check_before_start(config)
    if command and shutil.which(command[0]) is None:
        typer.echo(f"error: {command[0]}: cannot be found or run; give a command that exists", err=True)
        raise typer.Exit(EXIT_NO_COMMAND)
    console = Console(stderr=True)
    progress = progress_for(console)
    state_dir = StateDir.claim_free(RUN_FILE.parent, config.name)
    run_file = RunFile(RUN_FILE, state_dir.path)
    mesh = LocalMesh(config, state_dir, run_file=run_file, on_event=progress.event)
    raise typer.Exit(_run(mesh, progress, command or []))


def _with_model(config: MeshConfig, **changes: Any) -> MeshConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def with_overrides(config: MeshConfig, overrides: dict[str, Any]) -> MeshConfig:
    """``config`` with dotted keys replaced, validated as a whole; None leaves a key as it is.

    Raises:
        UserError: the result is not valid.
    """
    data = config.model_dump()
    for key, value in overrides.items():
        if value is not None:
            *sections, last = key.split(".")
            section = data
            for name in sections:
                section = section[name]
            section[last] = value
    return parse_config(data, "the command line")


def _run(mesh: LocalMesh, progress: Progress, command: Sequence[str]) -> int:
    def on_signal(number: signal.Signals) -> None:
        if mesh.interrupt(number):
            return
        progress.say("killing the services")  # the second signal: somebody does not want to wait
        mesh.kill_all()

    with SignalWatch(on_signal):
        try:
            _start(mesh, progress)
            return _run_command(mesh, command) if command else _serve_on(mesh)
        except MeshInterruptedError as error:
            return 130 if error.number == signal.SIGINT else 0
        except MeshFailedError as error:
            typer.echo(f"error: {error}", err=True)
            return error.exit_code
        finally:
            progress.say("stopping the mesh")
            mesh.stop()
            progress.say("stopped")


def _start(mesh: LocalMesh, progress: Progress) -> None:
    started_s = time.monotonic()
    config = mesh.config
    counts = {
        "balancer": config.balancer.servers,
        "router": config.router.servers,
        "attention server": config.attention.servers,
        "expert server": config.expert.servers,
        "colocated server": config.both_servers,
    }
    services = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)
    progress.say(f"starting {services} on {config.model.path or 'the demo model'}; logs in {mesh.state_dir}")
    with progress.starting():
        mesh.start()
        mesh.wait_ready(START_TIMEOUT_S)
    progress.say(f"the mesh serves after {time.monotonic() - started_s:.1f} s")
    if config.balancer.page_port is not None:
        progress.say(f"page of the mesh: {asyncio.run(page_address(mesh)) or 'see `expertmesh balancer status`'}")
    if (url := _http_url(mesh)) is not None:
        progress.say(f"OpenAI-compatible API on {url}/v1")
    typer.echo(f"router listening on {mesh.router}")


async def page_address(mesh: LocalMesh) -> str:
    """Its URL; '' when no balancer answers at once."""
    tls = admin_tls(mesh.config)
    leader = await find_leader(split_addresses(mesh.balancer), tls, PAGE_TIMEOUT_S)
    if leader is None:
        return ""
    with_key = key_interceptors(key_from_environment())
    async with rpc.open_channel(leader, tls, role="balancer", interceptors=with_key) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        try:
            return (await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=PAGE_TIMEOUT_S)).page
        except grpc.aio.AioRpcError:
            return ""


def _http_url(mesh: LocalMesh) -> str | None:
    scheme = "https" if mesh.config.door_tls.cert_file is not None else "http"
    return f"{scheme}://{mesh.http}" if mesh.http is not None else None


def _serve_on(mesh: LocalMesh) -> int:
    mesh.wait_failed()
    return 0


def _run_command(mesh: LocalMesh, command: Sequence[str]) -> int:
    environment = {**os.environ, "EXPERTMESH_ROUTER": mesh.router, "EXPERTMESH_BALANCER": mesh.balancer}
    if (url := _http_url(mesh)) is not None:
        environment["EXPERTMESH_HTTP"] = url
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        typer.echo(f"error: {command[0]}: cannot be run ({error.strerror}); give a command that exists", err=True)
        return EXIT_NO_COMMAND
    try:
        while process.poll() is None:
            mesh.raise_failure()
            _wait(process, 0.2)
    except BaseException:
        process.terminate()
        _wait(process, COMMAND_GRACE_S)
        raise
    finally:
        process.kill()
        process.wait()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        log.debug("%s still runs", process.args)
