"""``expertmesh trace``: what a command exports is in the file, and shown as the tree that it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expertmesh.cli import trace
from expertmesh.mesh.errors import UserError

pytestmark = pytest.mark.slow

TIMEOUT_S = 60
TRACE = [sys.executable, "-P", "-m", "expertmesh.cli.main", "trace"]

# As a service does it: telemetry that nothing but the environment switches on, flushed at the end.
PROGRAM = """
from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.telemetry import setup_telemetry

telemetry = setup_telemetry(TelemetryConfig(), role="router", instance="router-0")
with telemetry.tracer.start_as_current_span("generate demo", attributes={"expertmesh.replays": 1}):
    for layer in range(3):
        with telemetry.tracer.start_as_current_span("queue"):
            pass
with telemetry.tracer.start_as_current_span("migration"):
    pass
telemetry.shutdown()
"""
UNTIL_SIGTERM = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
raise SystemExit(5)
"""


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trace") / "new folder" / "spans.jsonl"
    command = [*TRACE, "record", "--out", str(file), "--", sys.executable, "-P", "-c", PROGRAM]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run(command, timeout=TIMEOUT_S, check=True, env=environment)
    return file


def show(*arguments: object) -> str:
    app = typer.Typer()
    app.add_typer(trace.app, name="trace")
    result = CliRunner().invoke(app, ["trace", "show", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_has_a_line_for_each_kind_of_trace(spans: Path) -> None:
    listed: list[dict[str, Any]] = json.loads(show(spans, "--json"))["traces"]
    assert {(entry["name"], entry["spans"], *entry["servers"]) for entry in listed} == {
        ("generate demo", 4, "router-0"),
        ("migration", 1, "router-0"),
    }
    assert "2 traces, 5 spans" in show(spans)


def test_tree_joins_siblings_of_one_name(spans: Path) -> None:
    shown = json.loads(show(spans, "--with", "generate", "--json"))
    (root,) = shown["tree"]
    assert (root["name"], root["count"]) == ("generate demo", 1)
    assert root["attributes"]["expertmesh.replays"] == 1
    (queue,) = root["children"]
    assert (queue["name"], queue["count"], queue["servers"]) == ("queue", 3, ["router-0"])
    assert queue["at_ms"] >= root["at_ms"]
    assert queue["longest_ms"] <= root["longest_ms"]
    text = show(spans, "--trace", shown["trace_id"][:8])
    assert "queue ×3" in text
    assert "replays=1" in text


def test_ids_are_hexadecimal_as_otlp_has_them(spans: Path) -> None:
    (line, *_) = spans.read_text(encoding="utf-8").splitlines()
    span = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert (len(bytes.fromhex(span["traceId"])), len(bytes.fromhex(span["spanId"]))) == (16, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--with", "replay"], "no trace has a span replay; name one of: generate demo, migration, queue"),
        (["--trace", "xyz"], "--trace: xyz is the id of 0 traces"),
    ],
)
def test_what_is_not_there_is_named(spans: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        show(spans, *arguments)
    assert message in str(refused.value)


def test_file_that_is_no_trace(tmp_path: Path) -> None:
    wrong = tmp_path / "spans.jsonl"
    wrong.write_text('{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"spans.jsonl:1: is no OTLP in JSON \(KeyError"):
        show(wrong)


@pytest.mark.parametrize(
    ("command", "status"),
    [(["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137), (["/nonexistent/command"], 127)],
)
def test_status_is_that_of_the_command(tmp_path: Path, command: list[str], status: int) -> None:
    ended = subprocess.run(
        [*TRACE, "record", "--out", str(tmp_path / "spans"), "--", *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr


def test_sigterm_reaches_the_command(tmp_path: Path) -> None:
    command = [*TRACE, "record", "--out", str(tmp_path / "spans"), "--", sys.executable, "-c", UNTIL_SIGTERM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 5
