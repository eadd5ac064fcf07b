"""What is said of reads by NIXL: from where to where, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch


class NixlError(Exception):
    """A read failed; the text says why."""


class Memory(Protocol):
    """Memory of one device that stays where it is as long as its agent."""

    @property
    def device(self) -> torch.device: ...

    @property
    def is_on_host(self) -> bool: ...

    def regions(self) -> Sequence[tuple[int, int]]:
        """All of it as addresses and sizes in bytes."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where something is in an agent's memory: ``pieces_P3`` uint64 [P, 3], address, bytes and device of each piece."""

    pieces_P3: np.ndarray
    on_host: bool

    @property
    def kind(self) -> str:
        return "DRAM" if self.on_host else "VRAM"


@dataclass(eq=False)
class Peer:
    """``is_lost``: it takes no more, and is forgotten with its last read; then what failed before is ``over`` too."""

    name: str
    reads: set[Reading] = field(default_factory=set)
    is_lost: bool = False
    over: list[Future[None]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Reading:
    """A read, from ``NixlAgent.start`` on.

    ``result``: set, or a ``NixlError``, when it has ended. ``over``: set when it is certain that nothing is written to
    ``ours`` any more; of a read that was given up or failed that may be long after, as long as its peer neither answers
    nor is gone. Both are set in the agent's thread. ``seconds``: how long one that has come took.
    """

    metadata: bytes
    theirs: Span
    ours: Span
    may_begin: Callable[[], bool]
    result: Future[None] = field(default_factory=Future)
    over: Future[None] = field(default_factory=Future)
    is_abandoned: bool = False
    began_s: float = 0.0
    seconds: float = 0.0
    handle: Any = None
    peer: Peer | None = None

    def abandon(self) -> None:
        """Nobody wants it any more; from any thread."""
        self.is_abandoned = True
