"""Which attention server takes a request: the one that has its prefix cached, unless that is too busy.

Rendezvous hashing (Thaler & Ravishankar, "Using name-based mappings to increase hit rates", 1998) over the first
tokens of the prompt: requests that share them prefer the same server, one that joins or leaves moves its share only.

Several routers do not see what the others send between two reports: all would send to the one server that was least
loaded. So each takes the better of two servers that it draws (Mitzenmacher, "The Power of Two Choices in Randomized
Load Balancing", 2001).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An attention server that serves now. ``outstanding_tokens``: still to prefill or to generate there."""

    server_id: str
    outstanding_tokens: int


def choose(
    candidates: Sequence[Candidate],
    prompt_token_ids: Sequence[int],
    *,
    affinity_tokens: int,
    slack_tokens: int,
    draw: random.Random | None = None,
) -> Candidate | None:
    """The server for a prompt; ``None`` when there is none.

    Args:
        affinity_tokens: leading tokens that decide the preferred server; 0 = least outstanding tokens alone.
        slack_tokens: by how many outstanding tokens the preferred server may exceed the least loaded one.
        draw: other routers choose at the same time: the less loaded of two servers, instead of the least loaded one.
    """
    if not candidates:
        return None
    least_loaded = min(candidates, key=_load)
    if affinity_tokens == 0:
        return _less_loaded(candidates, draw)
    prefix = array("I", prompt_token_ids[:affinity_tokens]).tobytes()
    preferred = max(candidates, key=lambda candidate: _weight(prefix, candidate.server_id))
    if preferred.outstanding_tokens - least_loaded.outstanding_tokens <= slack_tokens:
        return preferred
    return _less_loaded([candidate for candidate in candidates if candidate is not preferred], draw)


def _less_loaded(candidates: Sequence[Candidate], draw: random.Random | None) -> Candidate:
    if draw is not None and len(candidates) > 2:
        candidates = draw.sample(candidates, 2)
    return min(candidates, key=_load)


def _load(candidate: Candidate) -> tuple[int, str]:
    return candidate.outstanding_tokens, candidate.server_id


def _weight(prefix: bytes, server_id: str) -> bytes:
    return blake2b(server_id.encode() + b"\0" + prefix, digest_size=8).digest()
