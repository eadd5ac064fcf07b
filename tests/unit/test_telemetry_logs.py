"""Text and JSON logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from opentelemetry import context

from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.telemetry import context_from_traceparent, setup_logging

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(TelemetryConfig(log_format="json"), "router", "router-0")
    log = logging.getLogger("expertmesh.test")
    token = context.attach(context_from_traceparent(f"00-{TRACE_ID}-b7ad6b7169203331-01"))
    try:
        log.warning("lost %s", "a-0\nx", extra={"request_id": "r1", "level": "forged"})
    finally:
        context.detach(token)
    try:
        raise ValueError("oops")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "role": "router",
        "instance": "router-0",
        "logger": "expertmesh.test",
        "message": "lost a-0\nx",
        "request_id": "r1",
        "trace_id": TRACE_ID,
        "span_id": "b7ad6b7169203331",
    }
    assert "ValueError: oops" in second["exception"]
    assert "trace_id" not in second


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(TelemetryConfig(), "router", "router-0")
    logging.getLogger("expertmesh.test").info("hello\n2026 forged")
    logging.getLogger("expertmesh.test").debug("not shown")
    logging.getLogger("urllib3").info("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("Z INFO router-0 expertmesh.test: hello")
    assert lines[1:] == ["  2026 forged"]


def test_a_second_call_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(TelemetryConfig(), "router", "router-0")
    setup_logging(TelemetryConfig(log_level="error"), "router", "router-0")
    logging.getLogger("expertmesh.test").warning("not shown")
    logging.getLogger("expertmesh.test").error("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
