"""KV blocks on their way from the server that computed a prompt to the one that generates: what is sent and how.

Whoever generates asks for the chained digests of a prompt's full blocks (``kv_cache.chain_digests``) and gets the
blocks of the longest prefix that is there. A digest stands for all tokens up to the end of its block, so what comes is
what the asker would have computed itself; whatever does not come it computes. The asker proves with a ticket that it
was sent by a router that is linked to the giver.

One exchange a connection, little-endian: ``_ASK``, the digests; ``_GIVE``, the blocks, each layer after layer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expertmesh.attention_server.kv_cache import DIGEST_BYTES
from expertmesh.attention_server.prefix_desk import PrefixDesk
from expertmesh.mesh.addresses import split_host_port
from expertmesh.mesh.errors import UserError

log = logging.getLogger(__name__)

_MAGIC = b"EMKV"
_TICKET_BYTES = 32
_ASK = struct.Struct(f"<4s{_TICKET_BYTES}sIIQ")  # magic, ticket, tokens a block, blocks, bytes a block
_GIVE = struct.Struct("<BI")  # refusal, blocks
_REFUSALS = ("", "the ticket is not ours", "its KV blocks have another shape", "it asked for too many blocks")
_MAX_BLOCKS = 1 << 20


class HandoverError(Exception):
    """Blocks did not come; the text says why."""


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where KV blocks are to be had. ``ticket`` is a secret of the giver and of those who route to it."""

    address: str
    ticket: bytes


class BlockMemory:
    """The KV blocks of all layers as bytes.

    Args:
        layers: one tensor a layer, contiguous, [N, ...] with N = blocks × ``block_size``.
    """

    def __init__(self, layers: Sequence[torch.Tensor], block_size: int) -> None:
        self.block_size = block_size
        self._layers = [layer.view(torch.uint8).numpy().data.cast("B") for layer in layers]
        num_blocks = layers[0].shape[0] // block_size
        self._slabs = [len(layer) // num_blocks for layer in self._layers]

    @property
    def block_bytes(self) -> int:
        """Of a block, all layers together."""
        return sum(self._slabs)

    def views(self, block: int) -> list[memoryview]:
        """A block's bytes, layer after layer; writable."""
        return [layer[block * slab : (block + 1) * slab] for layer, slab in zip(self._layers, self._slabs, strict=True)]


class KvGiver:
    """Hands cached KV blocks out, from ``start`` to ``stop``.

    Args:
        timeout_s: for one exchange: blocks on their way cannot be evicted.
    """

    def __init__(self, memory: BlockMemory, desk: PrefixDesk, timeout_s: float) -> None:
        self._memory = memory
        self._desk = desk
        self._timeout_s = timeout_s
        self._ticket = secrets.token_bytes(_TICKET_BYTES)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.source: KvSource | None = None
        """Once it listens."""
        self.num_blocks = 0
        """Handed out so far."""

    async def start(self, host: str) -> None:
        """
        Raises:
            UserError: nothing can listen there.
        """
        try:
            self._server = await asyncio.start_server(self._connected, host, 0)
        except OSError as error:
            raise UserError(
                "dataplane.interface_host", f"nothing can listen on {host}: {error}", "name an address of this machine"
            ) from None
        port = self._server.sockets[0].getsockname()[1]
        self.source = KvSource(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self._ticket)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._exchange(reader, writer), name="kv-handover")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._answer(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.info("KV blocks were not handed out: %s", error or type(error).__name__)
        finally:
            await _hang_up(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        magic, ticket, block_size, count, block_bytes = _ASK.unpack(await reader.readexactly(_ASK.size))
        refusal = 0
        if magic != _MAGIC or not hmac.compare_digest(ticket, self._ticket):
            refusal = 1
        elif (block_size, block_bytes) != (self._memory.block_size, self._memory.block_bytes):
            refusal = 2
        elif count > _MAX_BLOCKS:
            refusal = 3
        if refusal:
            log.warning("%s is refused KV blocks: %s", writer.get_extra_info("peername"), _REFUSALS[refusal])
            writer.write(_GIVE.pack(refusal, 0))
            await writer.drain()
            return
        data = await reader.readexactly(count * DIGEST_BYTES)
        held = self._desk.hold([data[i : i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES)])
        try:
            # Nothing may be left in the transport when the blocks are let go: they would change under it.
            writer.transport.set_write_buffer_limits(high=0)
            writer.write(_GIVE.pack(0, len(held)))
            for block in held:
                writer.writelines(self._memory.views(block))
                await writer.drain()
            self.num_blocks += len(held)
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # what has not gone does not go
            self._desk.let_go(held)


async def fetch_blocks(
    source: KvSource, digests: Sequence[bytes], memory: BlockMemory, desk: PrefixDesk, timeout_s: float
) -> int:
    """Bring the prefix with these digests into the cache, as far as it is not there, the source has it, and there is
    room; returns the blocks that came.

    Raises:
        HandoverError: the source cannot be reached, refuses, or breaks off; blocks that had come whole are kept.
    """
    held = desk.hold(digests)
    try:
        missing = digests[len(held) :]
        reserved = desk.reserve(len(missing))
        try:
            if not reserved:
                return 0
            async with asyncio.timeout(timeout_s):
                return await _fetch(source, missing[: len(reserved)], reserved, memory, desk)
        except TimeoutError:
            raise HandoverError(f"{source.address} did not give them within {timeout_s:g} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise HandoverError(f"{source.address}: {error}") from None
        finally:
            desk.let_go(reserved)
    finally:
        desk.let_go(held)


async def _fetch(
    source: KvSource, digests: Sequence[bytes], blocks: Sequence[int], memory: BlockMemory, desk: PrefixDesk
) -> int:
    host, port = split_host_port(source.address)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_ASK.pack(_MAGIC, source.ticket, memory.block_size, len(digests), memory.block_bytes))
        writer.write(b"".join(digests))
        refusal, count = _GIVE.unpack(await reader.readexactly(_GIVE.size))
        if refusal:
            reason = _REFUSALS[refusal] if refusal < len(_REFUSALS) else f"code {refusal}"
            raise HandoverError(f"{source.address} refuses: {reason}")
        if count > len(digests):
            raise HandoverError(f"{source.address} would send {count} blocks where {len(digests)} were asked for")
        for block, digest in zip(blocks[:count], digests[:count], strict=True):
            for view in memory.views(block):
                view[:] = await reader.readexactly(len(view))
            desk.publish([block], [digest])
        return int(count)
    finally:
        await _hang_up(writer)


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Nothing that matters is left to send."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
