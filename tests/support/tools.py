"""Tools with environments of their own (tests/tools/NAME.txt), and ports for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


_PACKAGES = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
_PROGRAMS = {"rotel": f"{_PACKAGES}/rotel/rotel-agent"}  # of those that have none in bin/


def tool(name: str) -> Path:
    """Where the program of a tool is, installed or not."""
    return Path(sys.prefix) / "tools" / name / _PROGRAMS.get(name, f"bin/{name}")


def needs_tool(name: str) -> pytest.MarkDecorator:
    reason = f"not installed: {name}; `make .venv/tools/{name}/.installed` does it"
    return pytest.mark.skipif(not tool(name).exists(), reason=reason)


def free_port() -> int:
    """Of the loopback interface, a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, its output in ``log``; it is terminated at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def wait_for_url(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until it answers; fails with the log when the process ends, or does not come to it."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text()}"
            assert time.monotonic() < deadline_s, f"{url} does not answer: {log.read_text()}"
            time.sleep(0.1)
        else:
            return
