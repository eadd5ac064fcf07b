"""KV blocks from one cache to another, over real sockets: what comes, what is refused, and that no block is lost."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch

from expertmesh.attention_server.kv_cache import BlockManager, chain_digests
from expertmesh.attention_server.kv_handover import BlockMemory, HandoverError, KvGiver, KvSource, fetch_blocks
from expertmesh.attention_server.prefix_desk import PrefixDesk
from support.mesh_state import until

BLOCK_SIZE, NUM_BLOCKS, LAYERS = 4, 16, 3
TIMEOUT_S = 10.0
NOBODY = KvSource("127.0.0.1:9", b"?" * 32)


class Cache:
    """A KV cache with random content in every block."""

    def __init__(self, seed: int, *, num_blocks: int = NUM_BLOCKS, width: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_blocks * BLOCK_SIZE, 2, width)
        self.layers = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(LAYERS)]
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

    def content(self, block: int) -> bytes:
        return b"".join(bytes(view) for view in self.memory.views(block))


def digests_of(num_blocks: int) -> list[bytes]:
    digests: list[bytes] = []
    chain_digests(np.arange(num_blocks * BLOCK_SIZE), BLOCK_SIZE, digests, num_blocks * BLOCK_SIZE)
    return digests


@asynccontextmanager
async def giving(cache: Cache, timeout_s: float = TIMEOUT_S) -> AsyncIterator[KvGiver]:
    giver = KvGiver(cache.memory, cache.desk, timeout_s)
    await giver.start("127.0.0.1")
    try:
        yield giver
    finally:
        await giver.stop()


def source_of(giver: KvGiver) -> KvSource:
    assert giver.source is not None
    return giver.source


async def test_blocks_come_as_they_were() -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(6)
    given = theirs.compute(digests)
    async with giving(theirs) as giver:
        assert await fetch_blocks(source_of(giver), digests, ours.memory, ours.desk, TIMEOUT_S) == 6
        assert giver.num_blocks == 6
    found = ours.blocks.find_prefix(digests)
    assert [ours.content(block) for block in found] == [theirs.content(block) for block in given]
    assert ours.blocks.num_free == theirs.blocks.num_free == NUM_BLOCKS


async def test_only_what_is_missing_comes() -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(6)
    own = ours.compute(digests[:2])
    kept = [ours.content(block) for block in own]
    theirs.compute(digests[:5])
    async with giving(theirs) as giver:
        assert await fetch_blocks(source_of(giver), digests, ours.memory, ours.desk, TIMEOUT_S) == 3
        assert await fetch_blocks(source_of(giver), digests, ours.memory, ours.desk, TIMEOUT_S) == 0
    assert len(ours.blocks.find_prefix(digests)) == 5
    assert [ours.content(block) for block in own] == kept


async def test_a_full_cache_takes_half_of_what_is_free() -> None:
    ours, theirs, digests = Cache(0, num_blocks=6), Cache(1), digests_of(8)
    theirs.compute(digests)
    held = ours.blocks.allocate(2)
    async with giving(theirs) as giver:
        assert await fetch_blocks(source_of(giver), digests, ours.memory, ours.desk, TIMEOUT_S) == 2
    assert ours.blocks.num_free == 4
    ours.blocks.release(held)


@pytest.mark.parametrize(
    ("asker", "ticket", "reason"),
    [(Cache(0), b"x" * 32, "ticket"), (Cache(0, width=8), None, "another shape")],
)
async def test_refusals(asker: Cache, ticket: bytes | None, reason: str) -> None:
    theirs, digests = Cache(1), digests_of(2)
    theirs.compute(digests)
    async with giving(theirs) as giver:
        source = source_of(giver)
        if ticket is not None:
            source = KvSource(source.address, ticket)
        with pytest.raises(HandoverError, match=reason):
            await fetch_blocks(source, digests, asker.memory, asker.desk, TIMEOUT_S)
    assert asker.blocks.num_free == NUM_BLOCKS
    assert asker.blocks.find_prefix(digests) == []


Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def test_a_giver_that_dies_half_way() -> None:
    ours, digests = Cache(0), digests_of(3)

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(struct.calcsize("<4s32sIIQ") + 3 * 16)
        writer.write(struct.pack("<BI", 0, 3) + bytes(ours.memory.block_bytes + 5))  # one block and a bit
        await writer.drain()
        writer.close()

    with pytest.raises(HandoverError, match="bytes"):
        await _fetch_from(dies, ours, digests)
    assert len(ours.blocks.find_prefix(digests)) == 1
    assert ours.blocks.num_free == NUM_BLOCKS


async def test_a_giver_that_is_silent() -> None:
    ours, digests = Cache(0), digests_of(3)

    async def is_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    with pytest.raises(HandoverError, match=r"within 0\.1 s"):
        await _fetch_from(is_silent, ours, digests, timeout_s=0.1)
    assert ours.blocks.num_free == NUM_BLOCKS


async def test_a_giver_that_sends_more_than_was_asked_for() -> None:
    ours, digests = Cache(0), digests_of(2)

    async def overdoes_it(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack("<BI", 0, 3))
        await reader.read()
        writer.close()

    with pytest.raises(HandoverError, match="would send 3 blocks where 2"):
        await _fetch_from(overdoes_it, ours, digests)


async def test_nobody_is_there() -> None:
    ours = Cache(0)
    with pytest.raises(HandoverError, match=r"127\.0\.0\.1:9"):
        await fetch_blocks(NOBODY, digests_of(2), ours.memory, ours.desk, TIMEOUT_S)
    assert ours.blocks.num_free == NUM_BLOCKS


async def test_an_asker_that_does_not_read_frees_the_blocks_in_the_end() -> None:
    theirs = Cache(1, num_blocks=600, width=512)
    digests = digests_of(512)  # more than sockets buffer
    theirs.compute(digests)
    async with giving(theirs, timeout_s=1.0) as giver:
        host, _, port = source_of(giver).address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        ask = struct.pack("<4s32sIIQ", b"EMKV", source_of(giver).ticket, BLOCK_SIZE, 512, theirs.memory.block_bytes)
        writer.write(ask + b"".join(digests))
        await reader.readexactly(5)
        assert theirs.blocks.num_free < 600  # held: they are on their way

        async def all_are_free() -> bool:
            return theirs.blocks.num_free == 600

        await until(all_are_free, TIMEOUT_S, lambda: f"{theirs.blocks.num_free} of 600 blocks are free", poll_s=0.01)
        writer.transport.abort()


async def _fetch_from(peer: Peer, ours: Cache, digests: list[bytes], timeout_s: float = TIMEOUT_S) -> None:
    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    try:
        source = KvSource(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", bytes(32))
        await fetch_blocks(source, digests, ours.memory, ours.desk, timeout_s)
    finally:
        server.close()
        await server.wait_closed()
