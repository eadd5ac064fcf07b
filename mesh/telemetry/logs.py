"""Logs of a service: text or JSON lines on stderr, with the trace that was current."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from opentelemetry import trace

from expertmesh.mesh.config_telemetry import TelemetryConfig

_NOISY = ("asyncio", "filelock", "fsspec", "grpc", "opentelemetry", "PIL", "torch", "transformers", "urllib3")
_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) != "\t"}
_CONTROLS[ord("\n")] = "\n  "
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(config: TelemetryConfig, role: str, instance: str) -> None:
    """Send the root logger to stderr; replaces what an earlier call set up."""
    handler = _Stderr()
    handler.setFormatter(JsonFormatter(role, instance) if config.log_format == "json" else TextFormatter(instance))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(config.log_level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # not subscriptable at run time on Python 3.11
    """Ours, so that a second ``setup_logging`` finds and replaces it and leaves others (pytest's) alone."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO router-0 expertmesh.router.service: message trace=...``"""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time(record), record.levelname, self._instance, f"{record.name}:"]
        # Indented, so that a message that quotes what a client sent cannot forge a record, nor steer a terminal.
        parts.append(record.getMessage().translate(_CONTROLS))
        parts.extend(f"{key}={value}" for key, value in (_extra(record) | _trace()).items() if key != "span_id")
        return "\n".join([" ".join(map(str, parts)), *_details(self, record)])


class JsonFormatter(logging.Formatter):
    """One object a line; ``extra`` fields of the record stand beside the fixed ones."""

    def __init__(self, role: str, instance: str) -> None:
        super().__init__()
        self._identity = {"role": role, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line = _extra(record) | {
            "time": _time(record),
            "level": record.levelname.lower(),
            **self._identity,
            "logger": record.name,
            "message": record.getMessage(),
            **_trace(),
        }
        details = _details(self, record)
        if details:
            line["exception"] = "\n".join(details)
        return json.dumps(line, default=str, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _trace() -> dict[str, object]:
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


def _details(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    details = []
    if record.exc_info:
        details.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        details.append(formatter.formatStack(record.stack_info))
    return details
