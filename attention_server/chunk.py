"""What a step computes of one sequence, before it is launched and while it is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.request import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` tokens of a sequence from its position ``num_computed`` on, and behind its last one a ``draft``."""

    sequence: Sequence
    count: int
    draft: Draft = ()

    @property
    def num_rows(self) -> int:
        """What it computes in the step."""
        return self.count + len(self.draft)

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after it."""
        return self.sequence.num_computed + self.count == self.sequence.num_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether it computes tokens that were given (or lost to a preemption) rather than the one just sampled."""
        return self.count > 1 or self.sequence.num_computed < self.sequence.num_prompt


class LaunchedChunk(NamedTuple):
    """A chunk whose step is under way: the sequence's tokens from ``start`` to ``end`` - 1.

    ``completes``: the token that it gives, which nobody knows yet, is counted in ``num_tokens`` and ``num_pending``;
    drafted ones are not counted anywhere before they are known to be right.
    """

    sequence: Sequence
    start: int
    end: int
    completes: bool
    num_drafted: int = 0
