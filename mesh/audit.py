"""Audit events: who did what, when, with which outcome. One JSON object a line; keys and prompts are never in it."""

from __future__ import annotations

import json
import logging
import logging.handlers
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.token_bucket import TokenBucket

LOGGER = "expertmesh.audit"
_MAX_TEXT = 256
_DENIED_PER_S, _DENIED_BURST = 10.0, 100.0
"""Anybody can be refused as often as they like: beyond this rate refusals are only counted."""


class AuditLog:
    """Writes to a file, which may be rotated by others, or to the logger ``expertmesh.audit``.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path | None, server: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._bucket = TokenBucket(_DENIED_PER_S, _DENIED_BURST, clock)
        self._suppressed = 0
        self._handler: logging.Handler | None = None
        if path is not None:
            try:
                self._handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
            except OSError as error:
                raise UserError(
                    "api.audit_file", f"{path} cannot be written ({error.strerror})", "name a file in a folder of ours"
                ) from None

    def denied(self, who: Mapping[str, str], method: str, code: str, reason: str) -> None:
        """A call was refused before it reached anything."""
        if self._bucket.wait_s(1.0):
            self._suppressed += 1
            return
        self._bucket.take(1.0)
        counted = {"suppressed_before": self._suppressed} if self._suppressed else {}
        self._suppressed = 0
        self._write("denied", who, method, code, {"reason": reason[:_MAX_TEXT], **counted})

    def did(self, who: Mapping[str, str], method: str, code: str, request: object) -> None:
        """An admin call that changes something has ended."""
        self._write("admin", who, method, code, {"request": summary(request)})

    def close(self) -> None:
        if self._handler is not None:
            self._handler.close()

    def _write(self, event: str, who: Mapping[str, str], method: str, code: str, more: Mapping[str, Any]) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "event": event,
            "server": self._server,
            "who": dict(who),
            "method": method[:_MAX_TEXT],
            "outcome": code,
            **more,
        }
        # ASCII with escapes: nothing that a client sends can begin a line of its own, or colour a terminal.
        text = json.dumps(line)
        if self._handler is None:
            logging.getLogger(LOGGER).info("%s", text)
        else:
            self._handler.handle(logging.makeLogRecord({"msg": text, "name": LOGGER, "levelno": logging.INFO}))


def summary(request: object) -> dict[str, Any]:
    """What a request asks for: short fields as they are, of long ones how many entries there are."""
    if not isinstance(request, Message):
        return {}
    return {field.name: _shown(value) for field, value in request.ListFields()}


def _shown(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    return "..." if isinstance(value, Message | bytes) else f"{len(value)} entries"
