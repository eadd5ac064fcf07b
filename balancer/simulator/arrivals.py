"""Recorded arrivals of requests: when they came, how long prompt and output were.

CSV with a header or JSON lines, plain or compressed (``.xz``, ``.gz``), as published by Azure (LLM inference traces)
and Mooncake, or with the columns ``arrival_s``, ``prompt_tokens`` and ``output_tokens``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.mesh.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DATE = "TIMESTAMP"
TIMES = {"arrival_s": 1.0, "timestamp_ms": 1e-3, "timestamp": 1e-3, "arrival_time_ns": 1e-9, DATE: 1e-9}
"""Column → seconds of its unit; ``DATE`` holds dates."""
PROMPTS = ("prompt_tokens", "ContextTokens", "input_length", "input_toks")
OUTPUTS = ("output_tokens", "GeneratedTokens", "output_length", "output_toks")
COLUMNS = "give CSV or JSON lines with arrival_s, prompt_tokens and output_tokens, or an Azure or Mooncake trace"
MAX_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """N requests in the order in which they arrive, the first at second 0. All arrays are [N]; lengths are tokens,
    at least 1."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints

    def __len__(self) -> int:
        return len(self.arrival_s)

    def faster(self, factor: float) -> Arrivals:
        """The same requests at ``factor`` times the rate.

        Raises:
            UserError: the factor is not a positive number.
        """
        if not (np.isfinite(factor) and factor > 0):
            raise UserError("--rate-scale", f"{factor} is not a positive number", "give 1 for the recorded rate")
        arrival_s = self.arrival_s / factor
        return Arrivals(arrival_s=arrival_s, prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens)


def make_arrivals(arrival_s: Floats, prompt_tokens: Ints, output_tokens: Ints) -> Arrivals:
    """Sorted by time; the first request comes at second 0."""
    order = np.argsort(arrival_s, kind="stable")
    return Arrivals(
        arrival_s=arrival_s[order] - arrival_s.min(),
        prompt_tokens=prompt_tokens[order],
        output_tokens=output_tokens[order],
    )


def read_arrivals(path: Path) -> Arrivals:
    """
    Raises:
        UserError: the file cannot be read, has none of the known columns or no request, or a row is not one; the key
            names file and line.
    """
    times: list[Any] = []
    lengths: list[tuple[int, int]] = []
    columns: tuple[str, str, str] | None = None
    for line, row in _rows(path):
        if columns is None:
            columns = _columns(path, row)
        time, prompt, output = (row.get(column) for column in columns)
        times.append(_time(f"{path}: line {line}: {columns[0]}", columns[0], time))
        lengths.append(
            (
                _length(f"{path}: line {line}: {columns[1]}", prompt),
                _length(f"{path}: line {line}: {columns[2]}", output),
            )
        )
    if columns is None:
        raise UserError(str(path), "holds no request", COLUMNS)
    time_N = np.array(times)
    seconds_N = (time_N - time_N.min()).astype(np.float64) * TIMES[columns[0]]
    prompt_N, output_N = np.array(lengths, np.int64).T
    return make_arrivals(seconds_N, prompt_N, output_N)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = _text(path)
    if not text.lstrip().startswith("{"):
        for line, cells in enumerate(csv.DictReader(io.StringIO(text)), start=2):
            yield line, cells
        return
    for line, content in enumerate(text.splitlines(), start=1):
        try:
            found = json.loads(content) if content.strip() else None
        except ValueError as error:
            raise UserError(f"{path}: line {line}", f"is not JSON ({error})", COLUMNS) from None
        if isinstance(found, dict):
            yield line, found
        elif found is not None:
            raise UserError(f"{path}: line {line}", "is no JSON object", COLUMNS)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        elif path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "name a file of recorded arrivals") from None
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise UserError(str(path), f"cannot be read ({error})", COLUMNS) from None


def _columns(path: Path, row: Mapping[str, Any]) -> tuple[str, str, str]:
    found = [next((name for name in names if name in row), None) for names in (TIMES, PROMPTS, OUTPUTS)]
    time, prompt, output = found
    if time is None or prompt is None or output is None:
        named = ", ".join(str(name) for name in row)
        raise UserError(str(path), f"columns {named[:200]} say no time and lengths", COLUMNS)
    return time, prompt, output


def _time(key: str, column: str, value: Any) -> Any:
    """Nanoseconds for dates, else a number in the column's unit."""
    try:
        if column == DATE:
            date = np.datetime64(str(value).strip().replace(" ", "T"), "ns")
            if np.isnat(date):
                raise ValueError("no date")
            return int(date.astype(np.int64))
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(key, f"{value!r} is no time", "mend or remove the line") from None
    if not np.isfinite(number):
        raise UserError(key, f"{value!r} is no time", "mend or remove the line")
    return number


def _length(key: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if not 1 <= number <= MAX_TOKENS or isinstance(value, float):
        raise UserError(key, f"{value!r} is no number of tokens from 1 to {MAX_TOKENS}", "mend or remove the line")
    return number
