"""KV blocks by NIXL: the asker reads them out of the giver's memory, straight into blocks of its own.

On the connection go terms alone, little-endian. The giver: ``_LEASE``, the metadata of its agent, the address of each
layer, the numbers of the blocks that it holds. The asker, when it has read them: ``_DONE``. The giver: ``_HELD``, and
only then lets go. So blocks that were let go of too early, however that came about, are never taken for what they were:
no clock decides.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_transport import HandoverError, KvSource
from expertmesh.attention_server.prefix_desk import PrefixDesk
from expertmesh.mesh.nixl_agent import NixlAgent
from expertmesh.mesh.nixl_reads import NixlError, Span
from expertmesh.mesh.nixl_setup import Purpose

KV_BLOCKS = Purpose(
    key="disaggregation.transport",
    what="KV blocks",
    where="the KV cache",
    remedy="set it to tcp between CPU ranks",
)

# Bytes of metadata, layers, all blocks of its cache, the device's number, whether it is the host.
_LEASE = struct.Struct("<IIIIB")
_DONE, _HELD = b"\x01", b"\x02"
_MAX_METADATA_BYTES = 1 << 20
_DIGEST_BYTES = 32


class _Lease(NamedTuple):
    """What the giver promises: all of it is in ``metadata`` or checked against it."""

    metadata: bytes
    starts_L: np.ndarray
    blocks_B: np.ndarray
    device: int
    on_host: bool


class NixlTransport:
    """Implements ``Transport``. The agent is the caller's to close."""

    magic = b"EMKN"

    def __init__(self, memory: BlockMemory, agent: NixlAgent) -> None:
        self._memory = memory
        self._agent = agent
        self.nixl_digest = _digest(agent.metadata)

    async def give(self, blocks: Sequence[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not blocks:
            return
        memory, metadata = self._memory, self._agent.metadata
        device, starts = memory.device.index or 0, memory.starts
        with self._agent.lending():
            writer.write(_LEASE.pack(len(metadata), len(starts), memory.num_blocks, device, memory.is_on_host))
            writer.write(metadata + np.array(starts, "<u8").tobytes() + np.array(blocks, "<u4").tobytes())
            await writer.drain()
            await reader.readexactly(len(_DONE))
            writer.write(_HELD)
            await writer.drain()

    async def take(
        self,
        source: KvSource,
        blocks: Sequence[int],
        digests: Sequence[bytes],
        desk: PrefixDesk,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        lease = await self._read_lease(source, len(blocks), reader)
        theirs, ours = self._spans(lease, np.array(blocks))
        desk.keep(blocks)  # of the read: it may outlive this call
        may_begin = desk.quiet()
        try:
            await self._agent.read(lease.metadata, theirs, ours, may_begin=may_begin, over=lambda: desk.let_go(blocks))
        except NixlError as error:
            raise HandoverError(str(error)) from None
        writer.write(_DONE)
        if await reader.readexactly(len(_HELD)) != _HELD:
            raise HandoverError(f"{source.address} did not hold the blocks until they were read")
        desk.publish(blocks, digests)

    async def _read_lease(self, source: KvSource, num_blocks: int, reader: asyncio.StreamReader) -> _Lease:
        size, num_layers, all_blocks, device, on_host = _LEASE.unpack(await reader.readexactly(_LEASE.size))
        if size > _MAX_METADATA_BYTES or num_layers != len(self._memory.slabs):
            raise HandoverError(f"{source.address} offers {num_layers} layers and {size} bytes of metadata")
        metadata = await reader.readexactly(size)
        starts_L = np.frombuffer(await reader.readexactly(8 * num_layers), "<u8")
        blocks_B = np.frombuffer(await reader.readexactly(4 * num_blocks), "<u4").astype(np.int64)
        # NIXL believes what it is given: only what the giver told its routers of itself goes there.
        if len(source.nixl_digest) != _DIGEST_BYTES or not hmac.compare_digest(_digest(metadata), source.nixl_digest):
            raise HandoverError(f"{source.address} has other NIXL metadata than its routers were told")
        if blocks_B.max() >= all_blocks:
            raise HandoverError(f"{source.address} names block {blocks_B.max()} of a cache of {all_blocks}")
        if int(starts_L.max()) + all_blocks * max(self._memory.slabs) >= 1 << 64:
            raise HandoverError(f"{source.address} names addresses that do not exist")
        return _Lease(metadata, starts_L, blocks_B, device, bool(on_host))

    def _spans(self, lease: _Lease, ours_B: np.ndarray) -> tuple[Span, Span]:
        """Where the blocks are, there and here: a piece for each layer and each run of blocks that lie side by side in
        both."""
        edges_B = (np.diff(lease.blocks_B) != 1) | (np.diff(ours_B) != 1)
        first_R = np.flatnonzero(np.concatenate([[True], edges_B]))
        count_R = np.diff(np.append(first_R, len(ours_B)))
        memory = self._memory
        theirs = Span(
            pieces_P3=_pieces(lease.starts_L, memory.slabs, lease.blocks_B[first_R], count_R, lease.device),
            on_host=lease.on_host,
        )
        starts_L, device = np.array(memory.starts, np.uint64), memory.device.index or 0
        ours = Span(
            pieces_P3=_pieces(starts_L, memory.slabs, ours_B[first_R], count_R, device), on_host=memory.is_on_host
        )
        return theirs, ours


def _pieces(
    starts_L: np.ndarray, slabs: Sequence[int], first_R: np.ndarray, count_R: np.ndarray, device: int
) -> np.ndarray:
    """uint64 [L·R, 3]: layer after layer, the runs of ``count_R`` blocks from ``first_R`` on."""
    slab_L1 = np.array(slabs, np.uint64)[:, None]
    pieces_LR3 = np.empty((len(slabs), len(first_R), 3), np.uint64)
    pieces_LR3[..., 0] = starts_L.astype(np.uint64)[:, None] + slab_L1 * first_R.astype(np.uint64)
    pieces_LR3[..., 1] = slab_L1 * count_R.astype(np.uint64)
    pieces_LR3[..., 2] = device
    return pieces_LR3.reshape(-1, 3)


def _digest(metadata: bytes) -> bytes:
    return hashlib.blake2b(metadata, digest_size=_DIGEST_BYTES).digest()
