"""Which KV block belongs to whom: paging, reference counts and prefix caching. No tensors live here.

A block is *free* when no sequence refers to it. A free block may still hold a *cached* prefix: it is taken back to
life by a prompt that starts with the same tokens, or evicted, least recently used first, when a block is needed.
Cached prefixes are found by the chained digest of their full blocks, so a hit means that all tokens up to the end of
the block are equal (up to a collision of 128-bit BLAKE2b).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DIGEST_BYTES = 16
ROOT_DIGEST = bytes(DIGEST_BYTES)


def chain_digests(tokens: np.ndarray, block_size: int, known: list[bytes], num_tokens: int) -> None:
    """Append to ``known`` the digests of the full blocks of the first ``num_tokens`` tokens that it lacks.

    The digest of block i covers the digest of block i-1 and the block's own tokens.

    Args:
        tokens: int64 [≥ num_tokens].
        known: digests of the first ``len(known)`` blocks; extended in place.
    """
    for block in range(len(known), num_tokens // block_size):
        parent = known[block - 1] if block else ROOT_DIGEST
        content = tokens[block * block_size : (block + 1) * block_size].tobytes()
        known.append(hashlib.blake2b(parent + content, digest_size=DIGEST_BYTES).digest())


class BlockManager:
    """Blocks 0 .. num_blocks-1 and who holds them."""

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.caches_prefixes = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that no sequence refers to, cached prefixes among them."""
        return len(self._blank) + len(self._cached_free)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences refer to, 0 .. 1."""
        return 1.0 - self.num_free / self.num_blocks

    def find_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest cached prefix with these digests; they are not referred to yet."""
        found: list[int] = []
        if self.caches_prefixes:
            for digest in digests:
                block = self._by_digest.get(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def num_available(self, prefix: Sequence[int]) -> int:
        """Blocks that ``allocate`` could give after ``refer(prefix)``."""
        return self.num_free - sum(not self._refs[block] for block in prefix)

    def refer(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each cached block of a found prefix."""
        for block in blocks:
            if not self._refs[block]:
                del self._cached_free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with undefined content, evicting cached prefixes if need be; there must be so many."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} are free"
        taken = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._refs[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence, given in the sequence's order.

        The tail becomes the first to be evicted: a prefix is worth more than what follows it.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is released more often than it was taken"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._digest[block] is None:
                self._blank.append(block)
            else:
                self._cached_free[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Let prompts find a full, computed block that a sequence refers to; a prefix known already keeps its block."""
        assert self._refs[block] > 0, f"block {block} is published but nobody holds it"
        if self.caches_prefixes and self._digest[block] is None and digest not in self._by_digest:
            self._digest[block] = digest
            self._by_digest[digest] = block

    def _evict(self) -> int:
        block, _ = self._cached_free.popitem(last=False)
        digest = self._digest[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digest[block] = None
        return block
