"""KV blocks by NIXL where something is wrong: lies, evictions, peers that hang or die; and that blocks alone move."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from expertmesh.attention_server.gpu_model import GpuKvCache
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_nixl import KV_BLOCKS, NixlTransport
from expertmesh.attention_server.kv_transport import HandoverError, KvSource, Transport
from expertmesh.attention_server.paged import PagedKvCache
from expertmesh.mesh import nixl_setup
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.nixl_agent import NixlAgent
from expertmesh.mesh.nixl_reads import NixlError, Span
from support.kv_caches import (
    BLOCK_SIZE,
    LAYERS,
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
from support.nixl import needs_nixl

pytestmark = [needs_nixl, pytest.mark.slow]

Lie = Callable[["Liar"], None]


class Liar(NixlTransport):
    """Offers what ``lie`` makes of the truth."""

    def __init__(self, theirs: Cache, agent: NixlAgent, ours: Cache, lie: Lie) -> None:
        super().__init__(theirs.memory, agent)
        self.asker = ours.memory
        self.metadata, self.starts = agent.metadata, list(theirs.memory.starts)
        self.all_blocks, self.blocks = theirs.memory.num_blocks, np.empty(0, np.int64)
        self.size = len(self.metadata)
        self.on_host = True
        self._lie = lie

    async def give(self, blocks: Sequence[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.blocks = np.array(blocks)
        self._lie(self)
        writer.write(struct.pack("<IIIIB", self.size, len(self.starts), self.all_blocks, 0, self.on_host))
        writer.write(self.metadata + np.array(self.starts, "<u8").tobytes() + self.blocks.astype("<u4").tobytes())
        await reader.read()
        writer.close()


def another_block(liar: Liar) -> None:
    liar.blocks[-1] = NUM_BLOCKS


def a_larger_cache(liar: Liar) -> None:
    """The block is behind the end of what is registered."""
    liar.blocks[-1], liar.all_blocks = 1 << 20, 1 << 21


def another_address(liar: Liar) -> None:
    liar.starts[0] -= 1 << 16


def a_far_address(liar: Liar) -> None:
    liar.starts[0] = 1 << 63


def the_askers_memory(liar: Liar) -> None:
    liar.starts = list(liar.asker.starts)


def a_device(liar: Liar) -> None:
    liar.on_host = False


def no_address(liar: Liar) -> None:
    liar.starts[1] = (1 << 64) - 8


def one_layer_less(liar: Liar) -> None:
    liar.starts.pop()


def other_metadata(liar: Liar) -> None:
    liar.metadata = liar.metadata[:-30] + bytes(30)


def much_metadata(liar: Liar) -> None:
    liar.size = 1 << 31


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (another_block, "names block 16 of a cache of 16"),
        (a_larger_cache, "NOT_FOUND"),
        (another_address, "NOT_FOUND"),
        (a_far_address, "NOT_FOUND"),
        (the_askers_memory, "NOT_FOUND"),
        (a_device, "NOT_FOUND"),
        (no_address, "addresses that do not exist"),
        (one_layer_less, "2 layers"),
        (other_metadata, "other NIXL metadata than its routers were told"),
        (much_metadata, "bytes of metadata"),
    ],
)
async def test_a_giver_that_lies(lie: Lie, reason: str) -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(3)
    theirs.compute(digests)
    before = [ours.content(block) for block in range(NUM_BLOCKS)]
    with (
        travelling(ours, "nixl") as taking,
        contextlib.closing(NixlAgent(theirs.memory, "127.0.0.1", KV_BLOCKS)) as agent,
    ):
        async with giving(theirs, Liar(theirs, agent, ours, lie)) as giver:
            with pytest.raises(HandoverError, match=reason):
                await fetch(source_of(giver), digests, ours, taking)
        assert ours.blocks.find_prefix(digests) == []
        async with giving(theirs, NixlTransport(theirs.memory, agent)) as giver:  # the truth does still
            assert await fetch(source_of(giver), digests, ours, taking) == 3
    found = ours.blocks.find_prefix(digests)
    for block in set(range(NUM_BLOCKS)) - set(found):
        assert torch.equal(ours.content(block), before[block])
    assert ours.blocks.num_free == NUM_BLOCKS


@pytest.mark.parametrize("digest", [b"", b"short", bytes(32)])
async def test_metadata_that_no_router_told_of_is_not_looked_at(digest: bytes) -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(2)
    theirs.compute(digests)
    with travelling(ours, "nixl") as taking, travelling(theirs, "nixl") as transport:
        async with giving(theirs, transport) as giver:
            with pytest.raises(HandoverError, match="than its routers were told"):
                await fetch(dataclasses.replace(source_of(giver), nixl_digest=digest), digests, ours, taking)
    assert ours.blocks.num_free == NUM_BLOCKS


async def test_a_giver_that_knows_tcp_alone() -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(2)
    with travelling(ours, "nixl") as taking, travelling(theirs, "tcp") as transport:
        async with giving(theirs, transport) as giver:
            with pytest.raises(HandoverError, match=r"travel this way .*disaggregation\.transport"):
                await fetch(source_of(giver), digests, ours, taking)


async def test_blocks_that_are_evicted_before_they_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of ours that is under way keeps the read from beginning until the giver has given up waiting, and computed
    something else in its blocks."""
    ours, theirs, digests = Cache(0), Cache(1), digests_of(4)
    theirs.compute(digests)
    ours.desk.step_launched()
    with travelling(ours, "nixl") as taking, travelling(theirs, "nixl") as transport:
        give, has_given_up = transport.give, asyncio.Event()

        async def give_up(*arguments: Any) -> None:
            try:
                await give(*arguments)
            finally:
                has_given_up.set()

        monkeypatch.setattr(transport, "give", give_up)
        async with giving(theirs, transport, timeout_s=0.5) as giver:
            fetching = asyncio.create_task(fetch(source_of(giver), digests, ours, taking))
            async with asyncio.timeout(TIMEOUT_S):
                await has_given_up.wait()
            assert not fetching.done()
            theirs.compute(digests_of(NUM_BLOCKS, first_token=1000))
            with agent_of(transport).lending():  # so that the read itself succeeds
                ours.desk.step_landed()
                with pytest.raises(HandoverError, match="bytes read"):
                    await fetching
    assert ours.blocks.find_prefix(digests) == []
    assert ours.blocks.num_free == NUM_BLOCKS


async def test_a_peer_that_hangs_keeps_our_blocks_out_of_use_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(4)
    theirs.compute(digests)
    with travelling(ours, "nixl") as taking, travelling(theirs, "nixl") as transport:
        agent = agent_of(transport)
        lending = agent.lending
        monkeypatch.setattr(agent, "lending", contextlib.nullcontext)
        async with giving(theirs, transport) as giver:
            fetching = asyncio.create_task(fetch(source_of(giver), digests, ours, taking))
            await until_reading(agent_of(taking))
            fetching.cancel()  # as a time-out does
            with pytest.raises(asyncio.CancelledError):
                await fetching
            assert ours.blocks.num_free == NUM_BLOCKS - 4
            with pytest.raises(HandoverError, match="owes earlier reads"):
                await fetch(source_of(giver), digests, ours, taking)
            assert ours.blocks.num_free == NUM_BLOCKS - 4
            with lending():

                async def all_are_free() -> bool:
                    return ours.blocks.num_free == NUM_BLOCKS

                await until(all_are_free, TIMEOUT_S, lambda: f"{ours.blocks.num_free} are free", poll_s=0.01)
            assert ours.blocks.find_prefix(digests) == []
            monkeypatch.undo()
            assert await fetch(source_of(giver), digests, ours, taking) == 4


def agent_of(transport: Transport) -> NixlAgent:
    assert isinstance(transport, NixlTransport)
    return transport._agent


async def until_reading(agent: NixlAgent) -> None:
    async def has_begun() -> bool:
        return any(read.handle is not None for read in list(agent._worker.reads))

    await until(has_begun, TIMEOUT_S, lambda: "no read begins", poll_s=0.01)


_MUTE_GIVER = """
import sys
import torch
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_nixl import KV_BLOCKS
from expertmesh.mesh.nixl_agent import NixlAgent
memory = BlockMemory([torch.ones(16, 2, 6)], 4)
agent = NixlAgent(memory, "127.0.0.1", KV_BLOCKS)
print(agent.metadata.hex(), memory.starts[0], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mute_giver() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _MUTE_GIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate(timeout=TIMEOUT_S)


async def test_a_peer_that_is_killed_in_the_middle_of_a_read(mute_giver: subprocess.Popen[str]) -> None:
    """It never answers a read: so there is always one under way when it dies."""
    ours, over = Cache(0), threading.Event()
    assert mute_giver.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        metadata, start = (await asyncio.to_thread(mute_giver.stdout.readline)).split()
    theirs, own = (
        Span(pieces_P3=np.array([[at, 48, 0]], np.uint64), on_host=True) for at in (int(start), ours.memory.starts[0])
    )
    with contextlib.closing(NixlAgent(ours.memory, "127.0.0.1", KV_BLOCKS)) as agent:
        read = agent.read(bytes.fromhex(metadata), theirs, own, may_begin=lambda: True, over=over.set)
        reading = asyncio.create_task(read)
        await until_reading(agent)
        assert not reading.done()
        assert not over.is_set()
        mute_giver.kill()
        with pytest.raises(NixlError, match="DISCONNECT"):
            async with asyncio.timeout(TIMEOUT_S):
                await reading
        assert over.is_set()


def test_an_agent_that_nobody_has_any_more_ends() -> None:
    agent = NixlAgent(Cache(0).memory, "127.0.0.1", KV_BLOCKS)
    thread = agent._thread
    assert thread.is_alive()
    del agent
    gc.collect()  # an agent is in no cycle, but what tests put around it may be
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


async def test_an_agent_that_has_stopped_reads_nothing() -> None:
    ours, theirs, digests = Cache(0), Cache(1), digests_of(2)
    theirs.compute(digests)
    with travelling(ours, "nixl") as taking, travelling(theirs, "nixl") as transport:
        agent_of(taking).close()
        async with giving(theirs, transport) as giver:
            with pytest.raises(HandoverError, match="has stopped"):
                await fetch(source_of(giver), digests, ours, taking)
    assert ours.blocks.num_free == NUM_BLOCKS


def test_layers_side_by_side_are_registered_as_one() -> None:
    together = torch.zeros(LAYERS, NUM_BLOCKS * BLOCK_SIZE, 2, 8)
    memory = BlockMemory(together.unbind(), BLOCK_SIZE)
    assert memory.regions() == [(together.data_ptr(), together.nbytes)]
    apart = BlockMemory([together[0], together[2]], BLOCK_SIZE)
    assert apart.regions() == [(layer.data_ptr(), layer.nbytes) for layer in (together[0], together[2])]


def cpu_cache(*, shared: bool) -> Sequence[torch.Tensor]:
    """``shared``: as latent attention has it."""
    heads, size = (1, 24) if shared else (2, 8)
    return PagedKvCache(
        num_layers=LAYERS,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=heads,
        head_dim=size,
        dtype=torch.bfloat16,
        shared=shared,
    ).layers


def gpu_cache() -> Sequence[torch.Tensor]:
    spec = load_spec(ModelConfig(path=demo_model_path()))
    return GpuKvCache(spec, NUM_BLOCKS, BLOCK_SIZE, torch.device("cpu")).layers


@pytest.mark.parametrize(
    "layers_of", [lambda: cpu_cache(shared=False), lambda: cpu_cache(shared=True), gpu_cache], ids=["cpu", "mla", "gpu"]
)
async def test_a_block_is_the_same_positions_in_every_layer(layers_of: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Of the caches that ranks have: what comes are the positions of those blocks, no more and no less."""
    ours, theirs = Cache(0), Cache(1)
    for cache, seed in ((ours, 0), (theirs, 1)):
        cache.layers = list(layers_of())
        for layer in cache.layers:
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed)))
            seed += 2
        cache.memory = BlockMemory(cache.layers, BLOCK_SIZE)
    digests = digests_of(5)
    theirs.blocks.allocate(2)
    given = theirs.compute(digests)
    before = [ours.content(block) for block in range(NUM_BLOCKS)]
    with travelling(ours, "nixl") as taking, travelling(theirs, "nixl") as transport:
        async with giving(theirs, transport) as giver:
            assert await fetch(source_of(giver), digests, ours, taking) == 5
    found = ours.blocks.find_prefix(digests)
    for block, there in zip(found, given, strict=True):
        assert torch.equal(ours.content(block), theirs.content(there))
    for block in set(range(NUM_BLOCKS)) - set(found):
        assert torch.equal(ours.content(block), before[block])


async def test_nobody_is_there() -> None:
    ours = Cache(0)
    with travelling(ours, "nixl") as taking, pytest.raises(HandoverError, match=r"127\.0\.0\.1:9"):
        await fetch(KvSource("127.0.0.1:9", b"?" * 32, bytes(32)), digests_of(2), ours, taking)


def test_ucx_listens_at_the_interface_alone() -> None:
    def listening() -> set[str]:
        connections = psutil.Process().net_connections("tcp")
        return {f"{c.laddr.ip} {c.laddr.port}" for c in connections if c.status == psutil.CONN_LISTEN}

    before = listening()
    with travelling(Cache(0), "nixl"):
        of_ucx = listening() - before
    assert of_ucx
    assert all(address.startswith("127.0.0.1 ") for address in of_ucx), of_ucx


def test_the_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_setup, "_PACKAGES", ("nixl_of_nowhere",))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"(?s)disaggregation\.transport.*nixl_of_nowhere.*expertmesh\[nixl\]"):
        nixl_setup.load_nixl(KV_BLOCKS)


def test_logs_stay_ours() -> None:
    """The package sets logging up for the whole process."""
    logger = logging.getLogger("nixl")
    assert not logger.handlers
    assert logger.propagate
    assert logging.raiseExceptions
