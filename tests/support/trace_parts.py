"""A real collector (rotel) and a real trace UI (Phoenix)."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.tools import START_TIMEOUT_S, free_port, running, tool, wait_for_url

PROJECT = "default"


@contextmanager
def running_rotel(folder: Path, exporter: str) -> Iterator[str]:
    """The address of a collector that takes OTLP/gRPC and gives traces on to ``exporter`` (host:port)."""
    address, log = f"127.0.0.1:{free_port()}", folder / "rotel.log"
    command: list[str | Path] = [
        *(tool("rotel"), "start", "--otlp-grpc-endpoint", address),
        *("--otlp-http-endpoint", f"127.0.0.1:{free_port()}", "--exporters", "next:otlp", "--exporters-traces", "next"),
        *("--batch-timeout", "200ms"),
    ]
    environment = {
        "ROTEL_EXPORTER_NEXT_ENDPOINT": f"http://{exporter}",
        "ROTEL_EXPORTER_NEXT_PROTOCOL": "grpc",
    }
    with running(command, log, environment) as process:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        host, port = address.split(":")
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, f"rotel ended: {log.read_text()}"
                assert time.monotonic() < deadline_s, f"rotel does not listen: {log.read_text()}"
                time.sleep(0.02)
        yield address


class Phoenix:
    """Asked over its REST API."""

    def __init__(self, url: str, otlp: str) -> None:
        self.url = url
        self.otlp = otlp

    def spans(self) -> list[dict[str, Any]]:
        """All that it has; empty while it has none."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            url = f"{self.url}/v1/projects/{PROJECT}/spans?limit=1000" + (f"&cursor={cursor}" if cursor else "")
            with urllib.request.urlopen(url, timeout=30) as response:
                answer = json.load(response)
            found += answer["data"]
            cursor = answer.get("next_cursor") or ""
            if not cursor:
                return found


@contextmanager
def running_phoenix(folder: Path) -> Iterator[Phoenix]:
    http_port, grpc_port, log = free_port(), free_port(), folder / "phoenix.log"
    environment = {
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(http_port),
        "PHOENIX_GRPC_PORT": str(grpc_port),
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_WORKING_DIR": str(folder),
    }
    phoenix = Phoenix(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}")
    with running([tool("phoenix"), "serve"], log, environment) as process:
        wait_for_url(process, f"{phoenix.url}/healthz", log)
        yield phoenix
