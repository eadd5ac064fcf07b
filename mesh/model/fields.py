"""Typed reading of the JSON files of a checkpoint; every error names the file and the key."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.folder import open_inside

MAX_INTEGER = 2**31 - 1
MAX_JSON_BYTES = 100 * 10**6
"""Of a file or a header; safetensors' own limit for headers."""
MAX_JSON_DEPTH = 32
"""Deeper nesting is nobody's configuration, and some code below recurses."""
MAX_SHOWN = 300
"""Characters of a wrong value in a message."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A JSON object of a file. A key that is null counts as missing; a missing key without a default is an error.

    All methods raise ``UserError`` with the key ``FILE: KEY``.
    """

    file: str
    data: Mapping[str, Any]
    raw: bytes = b""

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        value = self._value(key, default)
        if not is_integer(value, minimum, maximum):
            raise self.error(key, f"is {value!r}", f"it must be an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, f"is {value!r}", f"it must be a number of at least {minimum:g}")
        if not minimum <= value <= sys.float_info.max:
            raise self.error(key, f"is {value!r}", f"it must be a number of at least {minimum:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}", "it must be true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r}", "it must be a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """One integer of 0 or more, or a list of them; missing = ()."""
        value = self.data.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(is_integer(item, 0, MAX_INTEGER) for item in values):
            raise self.error(key, f"is {value!r}", f"it must be an integer from 0 to {MAX_INTEGER}, or a list of such")
        return tuple(values)

    def section(self, key: str) -> Fields:
        """A nested object; missing = empty."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}", "it must be an object")
        return Fields(file=f"{self.file}: {key}", data=value)

    def error(self, key: str, problem: str, remedy: str) -> UserError:
        shown = problem if len(problem) <= MAX_SHOWN else f"{problem[:MAX_SHOWN]} ..."
        return UserError(f"{self.file}: {key}", shown, remedy)

    def _value(self, key: str, default: object) -> object:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing", "use a complete Hugging Face checkpoint")
        return default


def is_integer(value: object, minimum: int, maximum: int) -> TypeGuard[int]:
    """True is none, although Python's booleans are integers."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def read_fields(path: Path) -> Fields:
    """Read a JSON object from a file of a checkpoint folder.

    Raises:
        UserError: the file cannot be read, leads out of its folder, or does not hold a JSON object.
    """
    try:
        with os.fdopen(open_inside(path.parent, path.name), "rb") as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            raw = stream.read(num_bytes) if num_bytes <= MAX_JSON_BYTES else None
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "point model.path at a Hugging Face checkpoint folder"
        ) from None
    if raw is None:
        raise UserError(str(path), f"is longer than {MAX_JSON_BYTES} bytes", "fetch the file again")
    return Fields(file=str(path), data=parse_object(raw, str(path)), raw=raw)


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse bytes that must hold a JSON object.

    Raises:
        UserError: they do not, or hold a key twice, half of a surrogate pair in a key, or too deep a nesting; ``where``
            is its key.
    """
    try:
        data = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"is not valid JSON ({error})", "fetch the file again") from None
    if not isinstance(data, dict):
        raise UserError(where, f"holds a JSON {type(data).__name__}, not an object", "fetch the file again")
    if _is_deep(data):
        raise UserError(where, f"is nested more than {MAX_JSON_DEPTH} deep", "fetch the file again")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.{MAX_SHOWN}} occurs twice")
    for key in data:
        key.encode()  # raises UnicodeEncodeError, a ValueError
    return data


def _is_deep(data: dict[str, Any]) -> bool:
    level: list[Any] = [data]
    for _ in range(MAX_JSON_DEPTH):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True
