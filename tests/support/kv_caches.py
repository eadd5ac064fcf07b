"""KV caches that hand blocks over to each other, by every way there is here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import torch

from expertmesh.attention_server.kv_cache import BlockManager, chain_digests
from expertmesh.attention_server.kv_handover import KvGiver, fetch_blocks
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_nixl import KV_BLOCKS, NixlTransport
from expertmesh.attention_server.kv_transport import KvSource, TcpTransport, Transport
from expertmesh.attention_server.prefix_desk import PrefixDesk
from expertmesh.mesh.nixl_agent import NixlAgent
from expertmesh.mesh.rank_security import RankSecurity

BLOCK_SIZE, NUM_BLOCKS, LAYERS = 4, 16, 3
TIMEOUT_S = 20.0


class Cache:
    """A KV cache with random content in every block."""

    def __init__(
        self, seed: int, *, num_blocks: int = NUM_BLOCKS, width: int = 6, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_blocks * BLOCK_SIZE, 2, width)
        self.layers = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(LAYERS)]
        self.memory = BlockMemory(self.layers, BLOCK_SIZE)
        self.blocks = BlockManager(num_blocks, enable_prefix_caching=True)
        self.desk = PrefixDesk(self.blocks, threading.Lock())

    def compute(self, digests: list[bytes]) -> list[int]:
        """As if a sequence had computed them and ended."""
        taken = self.blocks.allocate(len(digests))
        for block, digest in zip(taken, digests, strict=True):
            self.blocks.publish(block, digest)
        self.blocks.release(taken)
        return taken

    def content(self, block: int) -> torch.Tensor:
        """[layers, positions, ...], on the host."""
        rows = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        return torch.stack([layer[rows] for layer in self.layers]).cpu()


def digests_of(num_blocks: int, first_token: int = 0) -> list[bytes]:
    digests: list[bytes] = []
    tokens = np.arange(first_token, first_token + num_blocks * BLOCK_SIZE)
    chain_digests(tokens, BLOCK_SIZE, digests, num_blocks * BLOCK_SIZE)
    return digests


@contextmanager
def travelling(cache: Cache, kind: str) -> Iterator[Transport]:
    """The transport of this kind, of a cache."""
    if kind == "tcp":
        yield TcpTransport(cache.memory)
        return
    agent = NixlAgent(cache.memory, "127.0.0.1", KV_BLOCKS)
    try:
        yield NixlTransport(cache.memory, agent)
    finally:
        agent.close()


@asynccontextmanager
async def giving(
    cache: Cache, transport: Transport, timeout_s: float = TIMEOUT_S, security: RankSecurity | None = None
) -> AsyncIterator[KvGiver]:
    giver = KvGiver(cache.memory, cache.desk, [transport], timeout_s, security)
    await giver.start("127.0.0.1")
    try:
        yield giver
    finally:
        await giver.stop()


def source_of(giver: KvGiver) -> KvSource:
    assert giver.source is not None
    return giver.source


async def fetch(
    source: KvSource,
    digests: list[bytes],
    cache: Cache,
    transport: Transport,
    timeout_s: float = TIMEOUT_S,
    security: RankSecurity | None = None,
) -> int:
    """As ``Fetching`` does."""
    async with asyncio.timeout(timeout_s):
        return await fetch_blocks(source, digests, cache.memory, cache.desk, transport, security)
