"""The block manager against a model of it."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.attention_server.kv_cache import BlockManager, chain_digests

NUM_BLOCKS = 6


class BlockManagerMachine(RuleBasedStateMachine):
    """Holders take prefixes and fresh blocks; a published block must hold its digest until it is evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, enable_prefix_caching=True)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(1, NUM_BLOCKS), prefix_length=st.integers(0, 3), chain=st.integers(0, 2))
    def take(self, count: int, prefix_length: int, chain: int) -> None:
        digests = [_digest(chain, index) for index in range(prefix_length)]
        prefix = self.manager.find_prefix(digests)
        assert [self.content[block] for block in prefix] == digests[: len(prefix)]
        fresh = max(0, count - len(prefix))
        if fresh > self.manager.num_available(prefix):
            return
        self.manager.refer(prefix)
        blocks = self.manager.allocate(fresh)
        held = {block for holder in self.holders for block in holder}
        assert not held & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.holders.append([*prefix, *blocks])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), chain=st.integers(0, 2))
    def publish(self, data: st.DataObject, chain: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        for index, block in enumerate(holder):
            digest = _digest(chain, index)
            known = digest in self.content.values()
            self.manager.publish(block, digest)
            if block not in self.content and not known:
                self.content[block] = digest

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.manager.release(holder)

    @invariant()
    def counts_add_up(self) -> None:
        held = {block for holder in self.holders for block in holder}
        assert self.manager.num_free == NUM_BLOCKS - len(held)
        assert self.manager.usage == 1 - self.manager.num_free / NUM_BLOCKS

    @invariant()
    def finds_what_is_cached(self) -> None:
        for block, digest in self.content.items():
            assert self.manager.find_prefix([digest]) == [block]


def _digest(chain: int, index: int) -> bytes:
    return f"{chain}/{index}".encode()


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_least_recently_freed_prefix_goes_first_and_tail_before_head() -> None:
    manager = BlockManager(4, enable_prefix_caching=True)
    old, new = manager.allocate(2), manager.allocate(2)
    for index, block in enumerate([*old, *new]):
        manager.publish(block, bytes([index]))
    manager.release(old)
    manager.release(new)
    assert manager.usage == 0
    manager.allocate(1)
    assert manager.find_prefix([b"\0"]) == [old[0]]
    assert manager.find_prefix([b"\1"]) == []
    assert manager.find_prefix([b"\2", b"\3"]) == new


def test_nothing_is_cached_when_switched_off() -> None:
    manager = BlockManager(2, enable_prefix_caching=False)
    (block,) = manager.allocate(1)
    manager.publish(block, b"x")
    assert manager.find_prefix([b"x"]) == []


def test_digest_covers_everything_before_the_block() -> None:
    first, second = np.array([1, 2, 3, 4]), np.array([9, 2, 3, 4])
    one: list[bytes] = []
    two: list[bytes] = []
    chain_digests(first, 2, one, 4)
    chain_digests(second, 2, two, 4)
    assert one[0] != two[0]
    assert one[1] != two[1]
    grown = one[:1]
    chain_digests(first, 2, grown, 4)
    assert grown == one
