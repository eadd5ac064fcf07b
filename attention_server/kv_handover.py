"""KV blocks on their way from the server that computed a prompt to the one that generates: who asks, who answers.

Whoever generates asks for the chained digests of a prompt's full blocks (``kv_cache.chain_digests``) and gets the
blocks of the longest prefix that is there. A digest stands for all tokens up to the end of its block, so what comes is
what the asker would have computed itself; whatever does not come it computes. The asker proves with a ticket that it
was sent by a router that is linked to the giver; with certificates both are known as ranks, over TLS.

One exchange a connection, little-endian: ``_ASK``, the digests; ``_GIVE``; then the blocks, as the ``Transport`` has it
that the asker named.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import struct
from collections.abc import Sequence

from expertmesh.attention_server.kv_cache import DIGEST_BYTES
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_transport import HandoverError, KvSource, Transport
from expertmesh.attention_server.prefix_desk import PrefixDesk
from expertmesh.mesh.addresses import split_host_port
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rank_security import RankSecurity

log = logging.getLogger(__name__)

_TICKET_BYTES = 32
_ASK = struct.Struct(f"<4s{_TICKET_BYTES}sIIQ")  # transport, ticket, tokens a block, blocks, bytes a block
_GIVE = struct.Struct("<BI")  # refusal, blocks
_REFUSALS = (
    "",
    "the ticket is not ours",
    "its KV blocks have another shape",
    "it asked for too many blocks",
    "they do not travel this way from here (disaggregation.transport)",
)
_MAX_BLOCKS = 1 << 20


class KvGiver:
    """Hands cached KV blocks out, from ``start`` to ``stop``.

    Args:
        transports: how they may travel.
        timeout_s: for one exchange: blocks on their way cannot be evicted.
        security: of the connections; None = in the clear.
    """

    def __init__(
        self,
        memory: BlockMemory,
        desk: PrefixDesk,
        transports: Sequence[Transport],
        timeout_s: float,
        security: RankSecurity | None = None,
    ) -> None:
        self._memory = memory
        self._desk = desk
        self._transports = {transport.magic: transport for transport in transports}
        self._timeout_s = timeout_s
        self._security = security
        self._ticket = secrets.token_bytes(_TICKET_BYTES)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.source: KvSource | None = None
        """Once it listens."""
        self.num_blocks = 0
        """Handed out so far."""

    async def start(self, host: str, port: int = 0) -> None:
        """
        Args:
            port: 0 = any free one.

        Raises:
            UserError: nothing can listen there.
        """
        try:
            context = self._security.called if self._security is not None else None
            self._server = await asyncio.start_server(self._connected, host, port, ssl=context)
        except OSError as error:
            raise UserError(
                "disaggregation.port" if port else "dataplane.interface_host",
                f"nothing can listen on {host}, port {port}: {error}",
                "name an address of this machine (dataplane.interface_host) and a port that is free (0 = any)",
            ) from None
        port = self._server.sockets[0].getsockname()[1]
        digest = b"".join(transport.nixl_digest for transport in self._transports.values())
        self.source = KvSource(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self._ticket, digest)

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
        if problem := _why_no_rank(self._security, writer):
            log.warning("%s is refused KV blocks: %s", writer.get_extra_info("peername"), problem)
            return
        magic, ticket, block_size, count, block_bytes = _ASK.unpack(await reader.readexactly(_ASK.size))
        refusal = 0
        if not hmac.compare_digest(ticket, self._ticket):
            refusal = 1
        elif (block_size, block_bytes) != (self._memory.block_size, self._memory.block_bytes):
            refusal = 2
        elif count > _MAX_BLOCKS:
            refusal = 3
        elif magic not in self._transports:
            refusal = 4
        if refusal:
            log.warning("%s is refused KV blocks: %s", writer.get_extra_info("peername"), _REFUSALS[refusal])
            writer.write(_GIVE.pack(refusal, 0))
            await writer.drain()
            return
        data = await reader.readexactly(count * DIGEST_BYTES)
        held = self._desk.hold([data[i : i + DIGEST_BYTES] for i in range(0, len(data), DIGEST_BYTES)])
        try:
            writer.write(_GIVE.pack(0, len(held)))
            await self._transports[magic].give(held, reader, writer)
            await writer.drain()
            self.num_blocks += len(held)
        finally:
            self._desk.let_go(held)
        if self._security is not None:  # TLS has a buffer of its own, which hanging up would drop
            with contextlib.suppress(ConnectionError):
                await reader.read(1)  # the asker hangs up when it has everything


async def fetch_blocks(
    source: KvSource,
    digests: Sequence[bytes],
    memory: BlockMemory,
    desk: PrefixDesk,
    transport: Transport,
    security: RankSecurity | None = None,
) -> int:
    """Bring the prefix with these digests into the cache, as far as it is not there, the source has it, and there is
    room; returns the blocks that came. Whoever calls bounds the time; cancelled, it leaves nothing behind.

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
            return await _fetch(source, missing[: len(reserved)], reserved, memory, desk, transport, security)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise HandoverError(f"{source.address}: {error}") from None
        finally:
            desk.let_go(reserved)
    finally:
        desk.let_go(held)


async def _fetch(
    source: KvSource,
    digests: Sequence[bytes],
    blocks: Sequence[int],
    memory: BlockMemory,
    desk: PrefixDesk,
    transport: Transport,
    security: RankSecurity | None,
) -> int:
    host, port = split_host_port(source.address)
    reader, writer = await asyncio.open_connection(host, port, ssl=security.calling if security is not None else None)
    try:
        if problem := _why_no_rank(security, writer):
            raise HandoverError(f"{source.address} is no rank: {problem}")
        writer.write(_ASK.pack(transport.magic, source.ticket, memory.block_size, len(digests), memory.block_bytes))
        writer.write(b"".join(digests))
        refusal, count = _GIVE.unpack(await reader.readexactly(_GIVE.size))
        if refusal:
            reason = _REFUSALS[refusal] if refusal < len(_REFUSALS) else f"code {refusal}"
            raise HandoverError(f"{source.address} refuses: {reason}")
        if count > len(digests):
            raise HandoverError(f"{source.address} would send {count} blocks where {len(digests)} were asked for")
        if count:
            await transport.take(source, blocks[:count], digests[:count], desk, reader, writer)
        return int(count)
    finally:
        await _hang_up(writer)


def _why_no_rank(security: RankSecurity | None, writer: asyncio.StreamWriter) -> str:
    """Why who is at the other end may not have KV blocks, or not give them; '' when they may."""
    return security.why_no_rank(writer.get_extra_info("peercert")) if security is not None else ""


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    """Nothing that matters is left to send."""
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
