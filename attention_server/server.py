"""An attention server: the half that steps and the service that routers link to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import torch

from expertmesh.attention_server.events import EndAll
from expertmesh.attention_server.fetching import Fetching
from expertmesh.attention_server.half import ServingHalf
from expertmesh.attention_server.kv_handover import KvGiver
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_nixl import KV_BLOCKS, NixlTransport
from expertmesh.attention_server.kv_transport import TcpTransport, Transport
from expertmesh.attention_server.outputs import Load, Output
from expertmesh.attention_server.service import AttentionService
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.device import CPU
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.nixl_agent import NixlAgent
from expertmesh.mesh.rank_security import rank_security
from expertmesh.mesh.telemetry import Metrics, Telemetry
from expertmesh.v1 import attention_pb2, attention_pb2_grpc, mesh_pb2

if TYPE_CHECKING:
    from expertmesh.attention_server.gpu_half import GpuHalf

log = logging.getLogger(__name__)

_TICK_S = 0.5  # how late a deadline may be noticed, and a load be told, while the rank does not step


def _open_half(
    config: MeshConfig, spec: ModelSpec, checkpoint: Checkpoint, telemetry: Telemetry, device: torch.device
) -> ServingHalf | GpuHalf:
    interval_s = config.telemetry.step_sample_interval_s
    if device.type == "cpu":
        return ServingHalf(
            config.attention,
            spec,
            checkpoint,
            telemetry,
            step_sample_interval_s=interval_s,
            speculation=config.speculation,
            micro_batches=config.dataplane.micro_batches,
        )
    if config.speculation.method != "off":
        raise UserError(
            "speculation.method",
            f"is {config.speculation.method!r}, and ranks on a GPU ({device}) do not verify drafts: their steps are "
            "graphs of one token a sequence",
            "set it to off, or device: cpu",
        )
    # Imported here: Triton, which it needs, is there only where a GPU is.
    from expertmesh.attention_server.gpu_half import GpuHalf

    return GpuHalf(
        config.attention,
        spec,
        checkpoint,
        telemetry,
        device,
        step_sample_interval_s=interval_s,
        micro_batches=config.dataplane.micro_batches,
    )


def open_nixl(config: MeshConfig, memory: BlockMemory) -> NixlAgent | None:
    """None = blocks travel by TCP alone."""
    transport = config.disaggregation.transport
    if transport == "tcp" and not memory.is_on_host:
        raise UserError(
            "disaggregation.transport",
            f"is 'tcp', which moves blocks between memories of hosts, and the KV cache is on {memory.device}",
            "set it to nixl or auto, or device: cpu",
        )
    if transport == "tcp" or (transport == "auto" and memory.is_on_host):
        return None
    return NixlAgent(memory, config.dataplane.interface_host, KV_BLOCKS)


def say_that_nixl_is_clear(config: MeshConfig) -> None:
    """
    Raises:
        UserError: everything between ranks has to be encrypted.
    """
    if config.dataplane.tls == "on":
        raise UserError(
            "dataplane.tls",
            "is on, and NIXL moves KV blocks in the clear",
            "set disaggregation.transport: tcp, or dataplane.tls: auto and a network that others cannot reach",
        )
    log.warning("KV blocks that travel by NIXL are not encrypted, though links between ranks are")


class AttentionServer:
    """``half`` belongs to the step thread, everything else to the event loop.

    Raises:
        UserError: the weights cannot be read or the KV cache is too small.
    """

    def __init__(
        self,
        config: MeshConfig,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        telemetry: Telemetry,
        device: torch.device = CPU,
    ) -> None:
        self.half = _open_half(config, spec, checkpoint, telemetry, device)
        self._max_num_seqs = config.attention.max_num_seqs
        self._service = AttentionService(self.half.engine, spec, telemetry)
        self._listen_at = config.dataplane.interface_host, config.disaggregation.port
        self._giver: KvGiver | None = None
        self._nixl: NixlAgent | None = None
        self._hand_over(config, telemetry.metrics)
        self._ticking: asyncio.Task[None] | None = None

    def _hand_over(self, config: MeshConfig, metrics: Metrics) -> None:
        section, memory = config.disaggregation, self.half.block_memory
        if section.role == "off":
            return
        if memory is None:
            raise UserError(
                "disaggregation.role",
                f"is {section.role!r}, and KV blocks are handed over from prefix cache to prefix cache",
                "set it to off, or attention.enable_prefix_caching: true",
            )
        self._nixl = open_nixl(config, memory)
        transports: list[Transport] = [] if self._nixl is None else [NixlTransport(memory, self._nixl)]
        if memory.is_on_host:
            transports.append(TcpTransport(memory))
        engine, timeout_s = self.half.engine, section.timeout_s
        security = rank_security(config.dataplane, config.tls)
        if security is not None and self._nixl is not None:
            say_that_nixl_is_clear(config)
        if section.role == "prefill":
            self._giver = KvGiver(memory, engine.prefixes, transports, timeout_s, security)
        else:
            changed = self._service.changed.set
            self._service.fetching = Fetching(engine, memory, transports[0], metrics, timeout_s, changed, security)

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the service to a gRPC server; returns its full name."""
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(self._service, server)
        return [attention_pb2.DESCRIPTOR.services_by_name["AttentionService"].full_name]

    def report(self) -> mesh_pb2.ServerLoad:
        """What the balancer hears of this server's work, since the report before."""
        engine = self.half.engine
        load = engine.load()
        prompt_tokens, generation_tokens = engine.num_computed_tokens
        return mesh_pb2.ServerLoad(
            num_requests_running=load.num_running,
            num_requests_waiting=load.num_waiting,
            max_num_requests=self._max_num_seqs,
            kv_cache_usage=load.kv_cache_usage,
            token_s=engine.take_token_s(),
            prompt_tokens=prompt_tokens,
            generation_tokens=generation_tokens,
        )

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def sink(outputs: list[Output], load: Load) -> None:
            loop.call_soon_threadsafe(self._service.deliver, outputs, load)

        self.half.engine.set_sink(sink)
        if self._giver is not None:
            await self._giver.start(*self._listen_at)
            self._service.kv_source = self._giver.source
        self._ticking = asyncio.create_task(self._tick_for_ever(), name="attention-tick")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests with UNAVAILABLE and wait for those that run; after the time-out they end so too."""
        self._service.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._num_active:
                    self._service.changed.clear()
                    await self._service.changed.wait()
        except TimeoutError:
            log.warning("%d requests did not end within %.1f s", self._num_active, timeout_s)
            self._end_all("this attention server is stopping")

    async def stop(self) -> None:
        """End what still runs with UNAVAILABLE and close the links."""
        self._service.draining = True
        if self._ticking is not None:
            await self._stop_serving(self._ticking)
            self._ticking = None
        if self._nixl is not None:
            await asyncio.to_thread(self._nixl.close)

    async def _stop_serving(self, ticking: asyncio.Task[None]) -> None:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        if self._service.fetching is not None:
            await self._service.fetching.stop()
        self._end_all("this attention server is stopping")
        if self._giver is not None:
            await self._giver.stop()
        self.half.engine.set_sink(None)
        # The outputs are in the loop's queue; they reach the links before this does.
        asyncio.get_running_loop().call_soon(self._service.close)

    @property
    def _num_active(self) -> int:
        fetching = self._service.fetching
        return self.half.engine.num_active + (0 if fetching is None else len(fetching))

    def _end_all(self, message: str) -> None:
        self.half.engine.post(EndAll(grpc.StatusCode.UNAVAILABLE, message))
        self.half.engine.tick()

    async def _tick_for_ever(self) -> None:
        while True:
            self.half.engine.tick()
            self._service.announce(self.half.engine.load())
            await asyncio.sleep(_TICK_S)
