"""Which drafted tokens of a step were right.

A step computes a draft as if it were known: behind a sequence's last token, one row for each drafted one. So it has
logits for the token after each of them, and the sampler chooses all of those tokens as it would have chosen them one by
one: a choice depends on the tokens before it, the seed and the position alone. The draft is right as far as it equals
what was chosen, and what was chosen behind it is one token more.

That is rejection sampling (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318) of a draft that has one
token with probability 1, with the draws coupled to those that there would be without a draft: a token is accepted with
the probability that the model gives it, else another one comes with the model's probability of that one. The output is
not only distributed as without drafts, it is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.sampler import Sampled


def prefixes(drafts: Sequence[Draft]) -> list[Draft]:
    """For each row that is sampled, the drafted tokens before it."""
    return [draft[:length] for draft in drafts for length in range(len(draft) + 1)]


@dataclass(frozen=True, slots=True)
class Verified:
    """What a step has chosen. ``chosen_S``: a token for each row that was sampled, int64.

    ``sampled``: those that are right, with the ``counts`` of each sequence. ``kept``: which of S they are, int64.
    """

    chosen_S: np.ndarray
    sampled: Sampled
    kept: np.ndarray

    @property
    def last_C(self) -> np.ndarray:
        """The row of S that gave each sequence's last token."""
        if self.sampled.counts is None:
            return self.kept
        last_C: np.ndarray = self.kept[np.cumsum(self.sampled.counts) - 1]
        return last_C

    @property
    def tokens_C(self) -> list[Draft]:
        """Each sequence's tokens."""
        tokens = iter(self.sampled.tokens.tolist())
        counts = self.sampled.counts or (1,) * len(self.sampled.tokens)
        return [tuple(itertools.islice(tokens, count)) for count in counts]


def verify(chosen: Sampled, drafts: Sequence[Draft] | None) -> Verified:
    """Of each sequence's tokens, those that are right.

    Args:
        chosen: one token for each of ``prefixes(drafts)``.
        drafts: of each sequence; None = there are none.
    """
    if drafts is None:
        return Verified(chosen.tokens, chosen, np.arange(len(chosen.tokens)))
    tokens = chosen.tokens.tolist()
    kept: list[int] = []
    counts: list[int] = []
    first = 0
    for draft in drafts:
        count = 1
        for drafted, token in zip(draft, tokens[first:], strict=False):
            if drafted != token:
                break
            count += 1
        kept.extend(range(first, first + count))
        counts.append(count)
        first += len(draft) + 1
    logprobs = {new: chosen.logprobs[old] for new, old in enumerate(kept) if old in chosen.logprobs}
    index = np.array(kept, np.int64)
    return Verified(chosen.tokens, Sampled(chosen.tokens[index], logprobs, tuple(counts)), index)
