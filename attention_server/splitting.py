"""A step's chunks as micro-batches, and their samples as those of the step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from expertmesh.attention_server.chunk import Chunk
from expertmesh.attention_server.sampler import Sampled


def split(chunks: list[Chunk], micro_batches: int) -> list[list[Chunk]]:
    """The chunks of each micro-batch: of one, or of two where there are several chunks.

    They stay in order, so that whatever is put together from both is as if there were one. The rows are as even as that
    allows; of two cuts that are equally good, the later one.
    """
    if micro_batches == 1 or len(chunks) < 2:
        return [chunks] if chunks else []
    rows = [chunk.num_rows for chunk in chunks]
    total = sum(rows)
    larger = [max(first, total - first) for first in accumulate(rows[:-1])]
    cut = len(larger) - larger[::-1].index(min(larger))
    return [chunks[:cut], chunks[cut:]]


def joined(parts: Sequence[Sampled]) -> Sampled:
    """The samples of micro-batches as those of their step."""
    if len(parts) == 1:
        return parts[0]
    logprobs, start = {}, 0
    for part in parts:
        logprobs.update({start + index: found for index, found in part.logprobs.items()})
        start += len(part.tokens)
    counts = None
    if any(part.counts is not None for part in parts):
        counts = tuple(count for part in parts for count in part.counts or (1,) * len(part.tokens))
    return Sampled(np.concatenate([part.tokens for part in parts]), logprobs, counts)
