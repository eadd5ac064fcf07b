"""``expertmesh trace record``: a collector for one machine, which writes the spans that it gets into a file."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from expertmesh.cli.signals import SignalWatch
from expertmesh.mesh.errors import UserError

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
_START_TIMEOUT_S = 10.0
_STOP_GRACE_S = 2.0
_ID_KEYS = ("traceId", "spanId", "parentSpanId")


def record(
    out: Annotated[Path, typer.Option(help="Gets OTLP in JSON, an export a line; what was in it is gone.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND ...]", help="Run meanwhile; its status is ours.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the loopback interface; 0 = any free port.")] = 0,
) -> None:
    """Receive spans over OTLP/gRPC and write them into a file, for `expertmesh trace show`.

    COMMAND runs with OTEL_EXPORTER_OTLP_ENDPOINT set, which every service takes that `telemetry.otlp_endpoint` does
    not send elsewhere: `expertmesh trace record --out spans.jsonl -- expertmesh up`. Without COMMAND it records until
    Ctrl-C, and prints the endpoint.
    """
    with recording(out, port) as endpoint:
        status = _run(command, endpoint) if command else _wait(endpoint)
    raise typer.Exit(status)


@contextmanager
def recording(out: Path, port: int) -> Iterator[str]:
    """A collector on loopback while the context lasts; gives its URL.

    Raises:
        UserError: the file cannot be written, or the port not be bound.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}", f"cannot be written ({error.strerror})", "name another file") from None
    with file, ThreadPoolExecutor(2, "otlp") as pool:
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0),))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Spans(file), server)  # type: ignore[no-untyped-call]  # generated without annotations
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_NoMetrics(), server)  # type: ignore[no-untyped-call]  # generated without annotations
        try:
            bound = server.add_insecure_port(f"127.0.0.1:{port}")
        except RuntimeError:
            raise UserError("--port", f"{port} cannot be bound on 127.0.0.1", "choose a free one, or 0") from None
        server.start()
        try:
            yield f"http://127.0.0.1:{bound}"
        finally:
            server.stop(_STOP_GRACE_S).wait(2 * _STOP_GRACE_S)


class _Spans(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        line = json.dumps(_as_otlp_json(request)) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
        return trace_service_pb2.ExportTraceServiceResponse()


class _NoMetrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Services send metrics to where their spans go: taken, so that none of them complains, and not kept."""

    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _as_otlp_json(request: trace_service_pb2.ExportTraceServiceRequest) -> dict[str, Any]:
    """As OTLP has it: protobuf's JSON, but for ids, which are hexadecimal."""
    data = MessageToDict(request, use_integers_for_enums=True)
    for resource in data.get("resourceSpans", ()):
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                for owner in (span, *span.get("links", ())):
                    owner.update({key: base64.b64decode(owner[key]).hex() for key in _ID_KEYS if key in owner})
    return data


def _run(command: Sequence[str], endpoint: str) -> int:
    running: Future[subprocess.Popen[bytes] | None] = Future()

    def pass_on(number: signal.Signals) -> None:
        # A terminal sends Ctrl-C to the command too, which would take a second one for impatience.
        is_told = number is signal.SIGINT and sys.stdin.isatty()
        if not is_told and (process := running.result(_START_TIMEOUT_S)) is not None:
            process.send_signal(number)

    with SignalWatch(pass_on):
        try:
            process = subprocess.Popen(command, env={**os.environ, ENDPOINT_VARIABLE: endpoint})
        except OSError as error:
            running.set_result(None)
            typer.echo(f"error: {command[0]}: cannot be run ({error.strerror}); give a command that exists", err=True)
            return 127
        running.set_result(process)
        status = process.wait()  # its owner is the user, who ends it
    return status if status >= 0 else 128 - status


def _wait(endpoint: str) -> int:
    ended = threading.Event()
    with SignalWatch(lambda number: ended.set()):
        typer.echo(f"recording spans on {endpoint}")
        ended.wait()  # its owner is the user, who ends it
    return 0
