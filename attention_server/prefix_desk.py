"""Prefixes of the KV cache for others than the scheduler: blocks to hand out, and blocks that come from elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from expertmesh.attention_server.kv_cache import BlockManager


class PrefixDesk:
    """From any thread. A block that is held here is neither evicted nor given to a sequence.

    Args:
        lock: of whoever else uses ``blocks``.
    """

    def __init__(self, blocks: BlockManager, lock: threading.Lock) -> None:
        self._blocks = blocks
        self._lock = lock
        self._num_launched = self._num_landed = 0

    def hold(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix with these digests; ``let_go`` of them in the end."""
        with self._lock:
            found = self._blocks.find_prefix(digests)
            self._blocks.refer(found)
        return found

    def keep(self, blocks: Sequence[int]) -> None:
        """Hold blocks that are held or reserved once more."""
        with self._lock:
            self._blocks.refer(blocks)

    def let_go(self, blocks: Sequence[int]) -> None:
        with self._lock:
            self._blocks.release(blocks)

    def reserve(self, count: int) -> list[int]:
        """Blocks to be written: at most ``count`` and at most half of what no sequence needs now."""
        with self._lock:
            return self._blocks.allocate(min(count, self._blocks.num_free // 2))

    def publish(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        """Reserved blocks hold these prefixes now: sequences may find them."""
        with self._lock:
            for block, digest in zip(blocks, digests, strict=True):
                self._blocks.publish(block, digest)

    def step_launched(self) -> None:
        """Under the lock, as ``step_landed``: of the engine."""
        self._num_launched += 1

    def step_landed(self) -> None:
        self._num_landed += 1

    def quiet(self) -> Callable[[], bool]:
        """Whether the steps that are under way now are over. Those may still write into blocks that are free: what a
        sequence that has ended meanwhile computes."""
        with self._lock:
            launched = self._num_launched
        return lambda: self._num_landed >= launched
