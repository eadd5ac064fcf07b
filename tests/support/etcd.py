"""A real etcd for tests: one member, on ports of its own, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

START_TIMEOUT_S = 30.0


def find_etcd() -> str | None:
    """The binary: on the path, or where `make test` unpacks it."""
    return shutil.which("etcd", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def why_not() -> str | None:
    """Why there is no etcd here; None when there is."""
    return None if find_etcd() is not None else "there is no command 'etcd' (Debian: apt-get install etcd-server)"


class EtcdProcess:
    """One member; ``start`` it, and ``stop`` it in the end."""

    def __init__(self, folder: Path, *options: str, scheme: str = "http") -> None:
        self._folder = folder
        self._options = options
        self._scheme = scheme
        self._ports = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        client, peer = f"{self._scheme}://{self.endpoint}", f"http://127.0.0.1:{self._ports[1]}"
        binary = find_etcd()
        assert binary is not None, why_not()
        urls = {
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "data-dir": str(self._folder / "data"),
            "log-level": "error",
        }
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [binary, *(f"--{key}={value}" for key, value in urls.items()), *self._options], stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._listens():
            assert self._process.poll() is None, f"etcd ended: {(self._folder / 'etcd.log').read_text()}"
            assert time.monotonic() < deadline_s, "etcd does not listen"
            time.sleep(0.02)

    def _listens(self) -> bool:
        """It does once it has a leader."""
        try:
            socket.create_connection(("127.0.0.1", self._ports[0]), timeout=1).close()
        except OSError:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it runs"
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdProcess]:
    """One for the tests of a module, which give their meshes names of their own."""
    reason = why_not()
    if reason is not None:
        print(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="expertmesh-etcd-") as folder:
        process = EtcdProcess(Path(folder))
        process.start()
        try:
            yield process
        finally:
            process.stop()
