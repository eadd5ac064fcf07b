"""Spans of the live mesh as its collector has them, and a request that runs while something happens to the mesh."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S
from support.otlp_collector import Collector, attributes

NUM_PROMPT_TOKENS = 3
ENDLESS_TOKENS = 1000
EXPORT_TIMEOUT_S = 30.0


class Trace:
    """The collected spans of one trace id."""

    def __init__(self, collector: Collector, trace_id: str) -> None:
        self._collector = collector
        self._trace_id = bytes.fromhex(trace_id)

    @property
    def spans(self) -> list[Span]:
        return [span for _, span in list(self._collector.spans) if span.trace_id == self._trace_id]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name.split()[0] == name]

    def wait_for(self, numbers: dict[str, int]) -> None:
        def complete() -> bool:
            counts = Counter(span.name.split()[0] for span in self.spans)
            return all(counts[name] >= number for name, number in numbers.items())

        self._collector.wait_for(complete, EXPORT_TIMEOUT_S)


def servers_of(spans: Iterable[Span]) -> set[str]:
    return {attributes(span.attributes)["expertmesh.instance"] for span in spans}


@asynccontextmanager
async def generating(live: LiveMesh, trace_id: str) -> AsyncIterator[None]:
    """A sampled request whose tokens come until the block has ended, and one more: then its client goes away."""
    arrived = asyncio.Event()
    async with rpc.open_channel(live.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        request = build_request([7] * NUM_PROMPT_TOKENS, max_tokens=ENDLESS_TOKENS, ignore_eos=True, seed=5)
        metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),)
        call = stub.Generate(request, metadata=metadata, timeout=REQUEST_TIMEOUT_S)

        async def read() -> None:
            async for _ in call:
                arrived.set()
            raise AssertionError(f"all {ENDLESS_TOKENS} tokens came before the test was done")

        reader = asyncio.create_task(read())
        try:
            await first_of(reader, arrived)
            yield
            arrived.clear()
            await first_of(reader, arrived)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            call.cancel()


async def first_of(reader: asyncio.Task[None], arrived: asyncio.Event) -> None:
    """Until another token has arrived; what ends the reader before is raised."""
    waiting = asyncio.create_task(arrived.wait())
    done, _ = await asyncio.wait({reader, waiting}, timeout=REQUEST_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert done, "no token came"
    if reader in done:
        reader.result()
