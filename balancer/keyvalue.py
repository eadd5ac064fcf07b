"""What the election and the shared state need of a key-value store; ``etcd`` is one, tests have another in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class UnreachableError(ConnectionError):
    """No member of the store answered in time; a write may have been done all the same."""


class DeposedError(RuntimeError):
    """A write came from a leader whose term is over: nothing was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A key's value. Revisions number the changes of the whole store; no two are ever the same."""

    value: bytes
    create_revision: int
    mod_revision: int
    lease: int  # 0: none


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """A transaction happens only while ``key`` is the one made at this revision; 0: while there is none."""

    key: str
    create_revision: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """``ttl_s``: keys that carry it go so long after its last renewal; the store may have granted more than asked."""

    id: int
    ttl_s: float


class KeyValues(Protocol):
    """Linearizable: what one client was told to be done, every other client sees.

    Every method raises ``UnreachableError``, and ``OSError`` when the store refuses (no space left, no permission).
    """

    async def get(self, key: str) -> Entry | None: ...

    async def list_keys(self, prefix: str) -> list[str]: ...

    async def transact(
        self, guard: Guard, *, puts: Mapping[str, bytes] | None = None, deletes: Sequence[str] = (), lease: int = 0
    ) -> bool:
        """All of it at once, or False when the guard does not hold.

        Args:
            deletes: a name that ends with ``/`` stands for all keys below it.
            lease: what ``puts`` carry.
        """
        ...

    async def grant(self, ttl_s: int) -> Lease: ...

    async def renew(self, lease: int) -> float:
        """Seconds that the lease runs from when the store heard of it; 0 when it is over."""
        ...

    async def revoke(self, lease: int) -> None:
        """End it, and every key that carries it. One that is over is no error."""
        ...

    async def wait_deleted(self, key: str, after: int, timeout_s: float) -> None:
        """Until ``key`` is deleted at a revision greater than ``after``; earlier whenever that cannot be told."""
        ...
