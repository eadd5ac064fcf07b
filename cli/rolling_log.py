"""What a service writes to stderr, in a file that is rolled before it grows too large."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

_DRAIN_TIMEOUT_S = 5.0
"""How long a pipe may stay open that its process left behind: a helper of its own may hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSize:
    """A file of up to ``max_bytes`` and ``keep`` older ones beside it: PATH.1 is the youngest of them."""

    max_bytes: int
    keep: int


@contextmanager
def opened(path: Path | None, size: LogSize | None) -> Iterator[IO[Any]]:
    """Something to give a process as its stderr; what it writes is at the end of ``path``.

    Args:
        path: None = this process's stderr.
        size: None = the file grows without bound.
    """
    if path is None:
        yield sys.stderr
        return
    if size is None:
        with path.open("a", encoding="utf-8") as file:
            yield file
        return
    read_end, write_end = os.pipe()
    pump = threading.Thread(target=_pump, args=(read_end, path, size), name=f"log {path.name}", daemon=True)
    pump.start()
    try:
        with os.fdopen(write_end, "wb") as pipe:
            yield pipe
    finally:
        pump.join(_DRAIN_TIMEOUT_S)
        if pump.is_alive():
            log.warning("somebody still writes to %s", path)


def _pump(read_end: int, path: Path, size: LogSize) -> None:
    """Until the last writer closes the pipe. A disk that is full costs lines, never the service."""
    handler = RotatingFileHandler(
        path, maxBytes=size.max_bytes, backupCount=size.keep, encoding="utf-8", errors="replace"
    )
    with os.fdopen(read_end, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            handler.handle(logging.makeLogRecord({"msg": line.removesuffix("\n")}))
    handler.close()
