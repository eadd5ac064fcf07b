"""Typed reading of the JSON files of a checkpoint; every error names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.mesh.errors import UserError

MAX_INTEGER = 2**31 - 1


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
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"is {value!r}", f"it must be an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value < float("inf"):
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

    def integers(self, key: str, *, minimum: int = 0) -> tuple[int, ...]:
        """One integer or a list of them; missing = ()."""
        value = self.data.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= minimum for item in values):
            raise self.error(key, f"is {value!r}", f"it must be an integer of at least {minimum} or a list of such")
        return tuple(values)

    def section(self, key: str) -> Fields:
        """A nested object; missing = empty."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}", "it must be an object")
        return Fields(file=f"{self.file}: {key}", data=value)

    def error(self, key: str, problem: str, remedy: str) -> UserError:
        return UserError(f"{self.file}: {key}", problem, remedy)

    def _value(self, key: str, default: object) -> object:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing", "use a complete Hugging Face checkpoint")
        return default


def read_fields(path: Path) -> Fields:
    """Read a JSON object.

    Raises:
        UserError: the file cannot be read or does not hold a JSON object.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "point model.path at a Hugging Face checkpoint folder"
        ) from None
    return Fields(file=str(path), data=parse_object(raw, str(path)), raw=raw)


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse bytes that must hold a JSON object.

    Raises:
        UserError: they do not; ``where`` is its key.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"is not valid JSON ({error})", "fetch the file again") from None
    if not isinstance(data, dict):
        raise UserError(where, f"holds a JSON {type(data).__name__}, not an object", "fetch the file again")
    return data
