"""``expertmesh serve``: one service of a mesh as one process, from its configuration to a clean exit."""

from __future__ import annotations

import asyncio
import enum
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from expertmesh.cli.addresses import checked_addresses
from expertmesh.mesh.config import MeshConfig, RouterConfig, load_config
from expertmesh.mesh.errors import EXIT_DEVICE_LOST, DeviceLostError, UserError

log = logging.getLogger(__name__)

_YOUNG_OBJECTS = 10_000  # made and not freed since garbage was looked for last
_LOOKS = (10, 2)  # at the young, before one at what outlived such a look; of those, before one at everything
ORPHAN_GRACE_S = 5.0
"""How long a process whose launcher died may drain."""


class ServiceRole(enum.StrEnum):
    ROUTER = "router"
    ATTENTION = "attention"
    EXPERT = "expert"
    BOTH = "both"
    BALANCER = "balancer"


def serve(
    role: Annotated[ServiceRole, typer.Argument(help="What this process is in the mesh.")],
    config_file: Annotated[Path | None, typer.Option("--config", help="mesh.yaml; unset = every default.")] = None,
    server_id: Annotated[str | None, typer.Option("--id", help="Name in the mesh; unset = ROLE-HOST-PID.")] = None,
    balancer: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,...", help="Where the balancer is; overrides balancer.address.")
    ] = None,
    node: Annotated[str | None, typer.Option(help="Ranks of one node share fast links; overrides node.")] = None,
    port: Annotated[int | None, typer.Option(help="Where a router or a balancer listens; overrides its port.")] = None,
    gpu: Annotated[
        int | None,
        typer.Option(min=0, help="Which GPU a rank computes on; unset = SLURM_LOCALID, LOCAL_RANK or the first."),
    ] = None,
    share_port: Annotated[
        bool, typer.Option("--share-port", help="Of a router: others of this user may listen at its ports too.")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of this machine, as others reach it; overrides every host that is set."),
    ] = None,
    stop_with_stdin: Annotated[bool, typer.Option(hidden=True, help="Stop when stdin ends.")] = False,
    ignore_sigterm: Annotated[bool, typer.Option(hidden=True, help="Only SIGINT stops it.")] = False,
) -> None:
    """Run one service until SIGTERM or SIGINT; it drains, then exits with 0. A second signal exits at once.

    When the gRPC server is up, one line goes to stdout: {"ready": true, "role": ..., "id": ..., "address": ...}, a
    router's with "http": HOST:PORT too.
    """
    _leave_no_core()
    if stop_with_stdin:
        threading.Thread(target=_stop_when_stdin_ends, name="launcher-watch", daemon=True).start()
    config = _with_overrides(_with_host(load_config(config_file), host), role, balancer, node, port)
    if share_port:
        _check_shared(config.router, role)
    identity = server_id or f"{role.value}-{socket.gethostname()}-{os.getpid()}"
    config = config.model_copy(update={"tls": config.tls.for_service(role.value, identity)})
    status = 0
    try:
        uvloop.run(_run(config, role, identity, gpu, ignore_sigterm, share_port))
    except DeviceLostError as error:
        log.error("%s exits with status %d, to be started again: %s", identity, EXIT_DEVICE_LOST, error)
        status = EXIT_DEVICE_LOST
    # Everything is closed and flushed: taking torch apart object by object would only cost 0.8 s of CPU a process.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _leave_no_core() -> None:
    """A core file would hold prompts and private keys. `prlimit --core=unlimited --pid PID` allows one again."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _with_overrides(
    config: MeshConfig, role: ServiceRole, balancer: str | None, node: str | None, port: int | None
) -> MeshConfig:
    """The configuration with what this process was told, and with the balancer's address for all who need it."""
    if port is not None:
        config = _with_port(config, role, port)
    section = config.balancer
    address = balancer or section.address or (f"{section.host}:{section.port}" if section.port else None)
    if role is not ServiceRole.BALANCER:
        if address is None:
            raise UserError(
                "balancer.address",
                "is not set and balancer.port is 0",
                "set one of them, or give --balancer HOST:PORT",
            )
        checked_addresses("--balancer" if balancer else "balancer.address", address)
    return config.model_copy(
        update={"balancer": section.model_copy(update={"address": address}), "node": node or config.node}
    )


def _with_host(config: MeshConfig, host: str | None) -> MeshConfig:
    """The configuration with everything listening on ``host``."""
    if host is None:
        return config
    changes = {"router": "host", "balancer": "host", "dataplane": "interface_host", "telemetry": "metrics_host"}
    update = {name: getattr(config, name).model_copy(update={key: host}) for name, key in changes.items()}
    return config.model_copy(update=update)


def _with_port(config: MeshConfig, role: ServiceRole, port: int) -> MeshConfig:
    if role not in (ServiceRole.ROUTER, ServiceRole.BALANCER):
        raise UserError("--port", f"{port} is given for a rank, which picks its ports", "leave it out")
    if not 0 <= port < 65536:
        raise UserError("--port", f"{port} is not a port", "give one from 0 to 65535 (0 = any)")
    section = getattr(config, role.value).model_copy(update={"port": port})
    return config.model_copy(update={role.value: section})


def _check_shared(router: RouterConfig, role: ServiceRole) -> None:
    if role is not ServiceRole.ROUTER:
        raise UserError("--share-port", f"is given for the role {role.value}", "leave it out: only routers share ports")
    ports = {"router.port": router.port, "router.http.port": router.http.port if router.http.enabled else None}
    for key, port in ports.items():
        if port == 0:
            raise UserError(key, "is 0, and --share-port has to know the port", "set it to that of the other routers")


async def _run(
    config: MeshConfig, role: ServiceRole, server_id: str, gpu: int | None, ignore_sigterm: bool, share_port: bool
) -> None:
    from expertmesh.mesh.model.spec import load_spec
    from expertmesh.mesh.telemetry import setup_logging, setup_telemetry

    stop = asyncio.Event()
    _stop_on_signals(stop, ignore_sigterm)
    setup_logging(config.telemetry, role.value, server_id)
    model_name = load_spec(config.model).name if role is not ServiceRole.BALANCER else ""
    telemetry = setup_telemetry(
        config.telemetry, role=role.value, instance=server_id, model_name=model_name, tls=config.tls, api=config.api
    )

    def ready(address: str, *, http: str | None = None) -> None:
        if role is ServiceRole.ROUTER:
            _collect_less_garbage()
        line = {"ready": True, "role": role.value, "id": server_id, "address": address}
        if http is not None:
            line["http"] = http
        print(json.dumps(line), flush=True)  # noqa: T201 - the launcher reads it

    try:
        if role is ServiceRole.BALANCER:
            from expertmesh.balancer.server import serve as serve_balancer
            from expertmesh.mesh.background import preempt_nobody

            preempt_nobody()  # where ranks share its cores, every step would wait for its turns; it can wait for theirs
            await serve_balancer(config, server_id=server_id, stop=stop, ready=ready, telemetry=telemetry)
        elif role is ServiceRole.ROUTER:
            from expertmesh.router.server import serve as serve_router

            await serve_router(
                config, server_id=server_id, stop=stop, ready=ready, telemetry=telemetry, share_ports=share_port
            )
        else:
            from expertmesh.cli.rank import serve_rank

            await serve_rank(
                config, role=role.value, server_id=server_id, stop=stop, ready=ready, telemetry=telemetry, gpu=gpu
            )
    finally:
        telemetry.shutdown()
    log.info("%s %s stopped", role.value, server_id)


def _collect_less_garbage() -> None:
    """For a process whose every token makes objects, and hardly a cycle: looking for those took a tenth of its time.

    A cycle that lives as long as a request is found by a look at everything alone. Requests leave none that is known
    (tests/integration/test_router_memory.py); those that are not are looked for more often than Python would.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *_LOOKS)


def _stop_on_signals(stop: asyncio.Event, ignore_sigterm: bool) -> None:
    """
    Args:
        ignore_sigterm: a batch system sends it to all processes of a job at once, and the supervisor of this one says
            in its turn, with SIGINT, when it should stop.
    """
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("second %s: exiting at once", number.name)
            sys.stderr.flush()
            os._exit(128 + number)
        log.info("%s: draining", number.name)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, on_signal, signal.SIGINT)
    if ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGTERM, on_signal, signal.SIGTERM)


def _stop_when_stdin_ends() -> None:
    """The launcher holds the other end of stdin: when it dies, however it dies, this process stops too."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(ORPHAN_GRACE_S)
    os._exit(1)
