"""KV blocks from one cache to another, over real sockets: what comes, what is refused, and that no block is lost."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_transport import HandoverError, KvSource, TcpTransport
from expertmesh.attention_server.server import open_nixl
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rank_security import RankSecurity
from support.kv_caches import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    TIMEOUT_S,
    Cache,
    digests_of,
    fetch,
    giving,
    source_of,
    travelling,
)
from support.mesh_state import until
from support.nixl import TRANSPORTS
from support.secure_server import authority as authority
from support.secure_server import tls_as

NOBODY = KvSource("127.0.0.1:9", b"?" * 32)
EACH_WAY = pytest.mark.parametrize("kind", TRANSPORTS)


@EACH_WAY
async def test_blocks_come_as_they_were(kind: str) -> None:
    """Whether they lie side by side here, there, or in neither cache."""
    ours, theirs, digests = Cache(0), Cache(1), digests_of(6)
    ours.blocks.release(ours.blocks.allocate(NUM_BLOCKS))  # they are given out from the last one on now
    given = theirs.compute(digests[:3])
    theirs.blocks.allocate(1)
    given += theirs.compute(digests[3:])
    before = [ours.content(block) for block in range(NUM_BLOCKS)]
    with travelling(ours, kind) as taking, travelling(theirs, kind) as transport:
        async with giving(theirs, transport) as giver:
            assert await fetch(source_of(giver), digests, ours, taking) == 6
            assert giver.num_blocks == 6
    found = ours.blocks.find_prefix(digests)
    for block, there in zip(found, given, strict=True):
        assert torch.equal(ours.content(block), theirs.content(there))
    for block in set(range(NUM_BLOCKS)) - set(found):
        assert torch.equal(ours.content(block), before[block])
    assert ours.blocks.num_free == NUM_BLOCKS
    assert theirs.blocks.num_free == NUM_BLOCKS - 1


@EACH_WAY
async def test_only_what_is_missing_comes(kind: str) -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(6)
    own = ours.compute(digests[:2])
    kept = [ours.content(block) for block in own]
    theirs.compute(digests[:5])
    with travelling(ours, kind) as taking, travelling(theirs, kind) as transport:
        async with giving(theirs, transport) as giver:
            assert await fetch(source_of(giver), digests, ours, taking) == 3
            assert await fetch(source_of(giver), digests, ours, taking) == 0
    assert len(ours.blocks.find_prefix(digests)) == 5
    assert all(torch.equal(ours.content(block), before) for block, before in zip(own, kept, strict=True))


@EACH_WAY
async def test_a_full_cache_takes_half_of_what_is_free(kind: str) -> None:
    ours, theirs, digests = Cache(0, num_blocks=6), Cache(1), digests_of(8)
    theirs.compute(digests)
    held = ours.blocks.allocate(2)
    with travelling(ours, kind) as taking, travelling(theirs, kind) as transport:
        async with giving(theirs, transport) as giver:
            assert await fetch(source_of(giver), digests, ours, taking) == 2
    assert ours.blocks.num_free == 4
    ours.blocks.release(held)


@EACH_WAY
@pytest.mark.parametrize(
    ("asker", "ticket", "reason"),
    [(Cache(0), b"x" * 32, "ticket"), (Cache(0, width=8), None, "another shape")],
)
async def test_refusals(kind: str, asker: Cache, ticket: bytes | None, reason: str) -> None:
    theirs, digests = Cache(1), digests_of(2)
    theirs.compute(digests)
    with travelling(asker, kind) as taking, travelling(theirs, kind) as transport:
        async with giving(theirs, transport) as giver:
            source = source_of(giver)
            if ticket is not None:
                source = replace(source, ticket=ticket)
            with pytest.raises(HandoverError, match=reason):
                await fetch(source, digests, asker, taking)
    assert asker.blocks.num_free == NUM_BLOCKS
    assert asker.blocks.find_prefix(digests) == []


@EACH_WAY
@pytest.mark.slow
@pytest.mark.security
async def test_over_tls_blocks_come_from_a_rank_to_a_rank(kind: str, authority: Path) -> None:
    """Not in the clear, not to another authority's, not to or from who is no rank: whatever tickets they have."""
    ours, theirs = Cache(0, num_blocks=1200, width=512), Cache(1, num_blocks=600, width=512)
    digests = digests_of(512)  # more than any buffer holds
    given = theirs.compute(digests)
    rank, client = (RankSecurity(tls_as(authority, name)) for name in ("attention-0", "client"))
    stranger = RankSecurity(tls_as(authority / "other", "operator", authority / "ca.pem"))
    with travelling(ours, kind) as taking, travelling(theirs, kind) as transport:
        async with giving(theirs, transport, security=rank) as giver:
            for security in (None, client, stranger):
                with pytest.raises(HandoverError):
                    await fetch(source_of(giver), digests, ours, taking, security=security)
            assert giver.num_blocks == 0
            assert await fetch(source_of(giver), digests, ours, taking, security=rank) == 512
        async with giving(theirs, transport, security=client) as giver:
            with pytest.raises(HandoverError, match="not for a rank"):
                await fetch(source_of(giver), digests_of(1, first_token=7), ours, taking, security=rank)
    found = ours.blocks.find_prefix(digests)
    assert all(torch.equal(ours.content(here), theirs.content(there)) for here, there in zip(found, given, strict=True))
    assert (theirs.blocks.num_free, ours.blocks.num_free) == (600, 1200)


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

    with pytest.raises(TimeoutError):
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
        await fetch(NOBODY, digests_of(2), ours, TcpTransport(ours.memory))
    assert ours.blocks.num_free == NUM_BLOCKS


async def test_an_asker_that_does_not_read_frees_the_blocks_in_the_end() -> None:
    theirs = Cache(1, num_blocks=600, width=512)
    digests = digests_of(512)  # more than sockets buffer
    theirs.compute(digests)
    async with giving(theirs, TcpTransport(theirs.memory), timeout_s=1.0) as giver:
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
        await fetch(source, digests, ours, TcpTransport(ours.memory), timeout_s)
    finally:
        server.close()
        await server.wait_closed()


def test_what_each_transport_needs() -> None:
    on_device = BlockMemory([torch.empty(BLOCK_SIZE, 2, 8, device="meta")], BLOCK_SIZE)
    with pytest.raises(UserError, match=r"disaggregation\.transport: is 'tcp', .*on meta"):
        open_nixl(with_transport("tcp"), on_device)
    for transport in ("tcp", "auto"):
        assert open_nixl(with_transport(transport), Cache(0).memory) is None


def with_transport(transport: str) -> MeshConfig:
    return parse_config({"disaggregation": {"role": "prefill", "transport": transport}})
