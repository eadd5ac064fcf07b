"""How KV blocks travel once their giver holds them: the interface, and TCP between memories of hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.prefix_desk import PrefixDesk


class HandoverError(Exception):
    """Blocks did not come; the text says why."""


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where KV blocks are to be had. ``ticket`` is a secret of the giver and of those who route to it.

    ``nixl_digest``: of the metadata of its NIXL agent, as it told its routers; empty = it has none.
    """

    address: str
    ticket: bytes
    nixl_digest: bytes = b""


class Transport(Protocol):
    """One side or the other of an exchange whose terms are settled. Whoever calls bounds the time.

    ``magic``: how an asker names it, four bytes. ``nixl_digest``: what routers are told of it, if anything.
    """

    magic: bytes
    nixl_digest: bytes

    async def give(self, blocks: Sequence[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand these blocks out, which are held meanwhile and let go of afterwards, however it ends."""

    async def take(
        self,
        source: KvSource,
        blocks: Sequence[int],
        digests: Sequence[bytes],
        desk: PrefixDesk,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Fill these blocks, which are reserved, with the ones that ``give`` has, and publish them.

        Raises:
            HandoverError: they did not come; those that are published did.
            OSError, asyncio.IncompleteReadError: of the connection.
        """


class TcpTransport:
    """Implements ``Transport``: the blocks follow on the connection itself, each layer after layer."""

    magic = b"EMKV"
    nixl_digest = b""

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory

    async def give(self, blocks: Sequence[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer.get_extra_info("sslcontext") is not None:
            for block in blocks:
                writer.writelines(map(bytes, self._memory.views(block)))  # copies: TLS has a buffer of its own
                await writer.drain()
            return
        # Nothing may be left in the transport when the blocks are let go: they would change under it.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            for block in blocks:
                *views, last = self._memory.views(block)
                writer.writelines(views)
                writer.write(last)  # writelines alone never makes drain wait in CPython 3.12.0 to 3.12.8
                await writer.drain()
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # what has not gone does not go

    async def take(
        self,
        source: KvSource,
        blocks: Sequence[int],
        digests: Sequence[bytes],
        desk: PrefixDesk,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        for block, digest in zip(blocks, digests, strict=True):
            for view in self._memory.views(block):
                view[:] = await reader.readexactly(len(view))
            desk.publish([block], [digest])
