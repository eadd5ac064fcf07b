"""API keys: what a file of them holds, how a key is made, found and checked, and how changes of the file are noticed.

A key is ``emk.ID.SECRET`` with 256 bits of randomness in SECRET, so a plain SHA-256 of it cannot be searched: slow
hashes are for secrets that people choose. Only the hash is stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError

from expertmesh.mesh.config_section import Section
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.token_bucket import TokenBucket

log = logging.getLogger(__name__)

Scope = Literal["generate", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("generate", "read", "admin")
ID_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,39}$"
POLL_S = 0.5
"""How late a change of the file may be noticed."""

_PREFIX = "emk"
_BURST_S = 1.0  # requests: a second's worth may come at once
_SECRET_BYTES = 32
_NOBODY = hashlib.sha256(b"").hexdigest()


class ApiKey(Section):
    """One entry of the file."""

    id: str = Field(pattern=ID_PATTERN)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    requests_per_s: float | None = Field(None, gt=0)
    tokens_per_min: float | None = Field(None, gt=0)

    def is_expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


class KeyFile(Section):
    """The whole file."""

    keys: tuple[ApiKey, ...] = ()


def new_secret(key_id: str) -> tuple[str, str]:
    """A new key and its hash. The key is shown once and kept nowhere."""
    key = f"{_PREFIX}.{key_id}.{secrets.token_urlsafe(_SECRET_BYTES)}"
    return key, digest(key)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).hexdigest()


def read_key_file(path: Path) -> dict[str, ApiKey]:
    """The keys by id.

    Raises:
        UserError: it cannot be read, is no such file, or has two keys of one id.
    """
    try:
        entries = KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "make it with `expertmesh keys create`"
        ) from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole)"
        raise UserError(str(path), f"{where}: {first['msg']}", "write it with `expertmesh keys`") from None
    by_id = {entry.id: entry for entry in entries}
    if len(by_id) < len(entries):
        raise UserError(str(path), "holds two keys of one id", "revoke one of them")
    return by_id


class Limits:
    """What is left to a key at this moment, on this server."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self._requests = self._tokens = None
        if key.requests_per_s is not None:
            capacity = max(1.0, key.requests_per_s * _BURST_S)
            self._requests = TokenBucket(key.requests_per_s, capacity, clock)
        if key.tokens_per_min is not None:
            self._tokens = TokenBucket(key.tokens_per_min / 60, key.tokens_per_min, clock)

    def take_request(self) -> tuple[str, float]:
        """Which limit stands in the way of a request, for how many seconds; '' and 0 = none does, and it counts."""
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1.0)):
            return "tokens_per_min", wait_s
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1.0):
                return "requests_per_s", wait_s
            self._requests.take(1.0)
        return "", 0.0

    def charge(self, tokens: int) -> None:
        """Tokens are known when they are there: the next request waits for what this one took too much."""
        if self._tokens is not None:
            self._tokens.take(tokens)


class KeyStore:
    """The keys of a file as they are now. ``watch`` follows it; one that cannot be used leaves the keys as they were.

    Args:
        clock: monotonic seconds, of the rate limits.
        now: wall-clock time, of the expiry.

    Raises:
        UserError: the file cannot be used.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float], now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = path
        self._clock = clock
        self._now = now
        self._stamp = _stamp_of(path)
        self._keys: Mapping[str, ApiKey] = read_key_file(path)
        self._limits: dict[str, Limits] = {}

    def find(self, presented: str) -> ApiKey | None:
        """The entry of a key; None when it is none of ours, or not any more."""
        _, _, key_id = presented.rpartition(".")[0].partition(".")
        entry = self._keys.get(key_id)
        # Compared in any case, so that time does not tell which ids there are.
        is_right = hmac.compare_digest(digest(presented), entry.sha256 if entry is not None else _NOBODY)
        return entry if is_right and entry is not None and not entry.is_expired(self._now()) else None

    def limits(self, entry: ApiKey) -> Limits:
        """The same object for as long as the file has this entry."""
        if entry.id not in self._limits:
            self._limits[entry.id] = Limits(entry, self._clock)
        return self._limits[entry.id]

    def reload(self) -> bool:
        """Read the file if it changed; whether there are other keys now."""
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            keys = read_key_file(self._path)
        except UserError as error:
            log.error("%s; the keys stay as they were", error)
            return False
        changed = {key_id for key_id, entry in self._keys.items() if keys.get(key_id) != entry}
        for key_id in changed:
            self._limits.pop(key_id, None)
        log.info("%s: %d keys", self._path, len(keys))
        self._keys = keys
        return True

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Follow the file until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            self.reload()


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Changes with the file: a mounted secret is replaced as a whole, an edited one gets another time or size."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def dump_key_file(keys: Mapping[str, ApiKey]) -> str:
    document = KeyFile(keys=tuple(keys.values())).model_dump(mode="json", exclude_none=True)
    return json.dumps(document, indent=1) + "\n"
