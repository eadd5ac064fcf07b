"""One rank process: its halves, its gRPC server and its membership, put together."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence

import grpc
import torch

from expertmesh.attention_server.server import AttentionServer
from expertmesh.expert_server.server import ExpertServer
from expertmesh.kernels.warm_up import warm_up
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.device import resolve_device
from expertmesh.mesh.gate import Gate
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.model.weights import open_checkpoint
from expertmesh.mesh.rank import RankServer
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""The step thread and the event loop share the interpreter: Python's default of 5 ms is longer than a step."""

STOP_GRACE_S = 1.0
"""How long open calls may go on once the rank has left the mesh."""

ROLES = {"attention": mesh_pb2.ROLE_ATTENTION, "expert": mesh_pb2.ROLE_EXPERT, "both": mesh_pb2.ROLE_BOTH}

DRAIN_TIMEOUT_S = 5.0
"""How long a stopping attention server waits for the sequences that it holds."""


async def serve_rank(
    config: MeshConfig,
    *,
    role: str,
    server_id: str,
    stop: asyncio.Event,
    ready: Callable[[str], None],
    telemetry: Telemetry,
    gpu: int | None = None,
) -> None:
    """Run an ``attention``, ``expert`` or ``both`` rank until ``stop``, then drain.

    Raises:
        UserError: the configuration or the checkpoint cannot be used.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    torch.set_num_threads(config.expert.num_threads if role == "expert" else config.attention.num_threads)
    started_s = time.monotonic()
    spec = load_spec(config.model, mtp=config.speculation.method == "mtp")
    device = resolve_device(config, gpu)
    checkpoint = open_checkpoint(config.model, spec, device, telemetry.metrics.checkpoint_read_bytes.add)
    checkpoint.log_unused(spec)
    await asyncio.to_thread(warm_up, attention=role != "expert", experts=role != "attention")
    # Slots first: on a GPU the KV cache gets its share of what they leave.
    experts = ExpertServer(config, spec, checkpoint, telemetry, device) if role != "attention" else None
    with checkpoint.progress("dense weights", checkpoint.dense_bytes(spec)):
        attention = AttentionServer(config, spec, checkpoint, telemetry, device) if role != "expert" else None
    log.info("loaded %s (%s) on %s in %.1f s", spec.name, spec.family, device, time.monotonic() - started_s)

    def register(server: grpc.aio.Server) -> Sequence[str]:
        return attention.register(server) if attention is not None else ()

    section = "expert" if role == "expert" else "attention"
    gate = Gate.of_roles(config.tls, config.api, server_id)
    server = await rpc.start_server(
        host=config.dataplane.interface_host,
        port=getattr(config, section).port,
        key=f"{section}.port",
        tls=config.tls,
        register=register,
        telemetry=telemetry,
        gate=gate,
    )
    rank = RankServer(
        config,
        role=ROLES[role],
        server_id=server_id,
        node=config.node,
        spec=spec,
        attention=attention.half if attention is not None else None,
        experts=experts.half if experts is not None else None,
        telemetry=telemetry,
        grpc_address=server.address,
        load=attention.report if attention is not None else None,
        device=device,
    )
    try:
        if attention is not None:
            await attention.start()
        server.set_serving(True)
        ready(server.address)
        await _step_until_stopped(rank, attention, stop)
    finally:
        if attention is not None:
            await attention.stop()
        await server.stop(STOP_GRACE_S)
        gate.close()


async def _step_until_stopped(rank: RankServer, attention: AttentionServer | None, stop: asyncio.Event) -> None:
    """Step until ``stop`` or until the balancer asks the rank to drain; finish the sequences first, then leave."""
    leave = asyncio.Event()
    running = asyncio.create_task(rank.run(leave), name="rank")
    asked = [
        asyncio.create_task(stop.wait(), name="wait for stop"),
        asyncio.create_task(rank.drain_asked.wait(), name="wait for drain"),
    ]
    try:
        await asyncio.wait((running, *asked), return_when=asyncio.FIRST_COMPLETED)
        if attention is not None and not running.done():
            await attention.drain(DRAIN_TIMEOUT_S)
        leave.set()
        await running
    finally:
        for task in (running, *asked):
            task.cancel()
        await asyncio.gather(running, *asked, return_exceptions=True)
