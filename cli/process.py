"""One supervised service process of a local mesh."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from expertmesh.cli.rolling_log import LogSize, opened

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 2.0
"""Short, since all others may wait for the one that died: without the balancer no view follows a death."""
HEALTHY_AFTER_S = 30.0
"""A process that lived so long starts again with the first back-off."""

FAILED_STARTS = 3
"""A service that ends so often without ever getting ready is given up."""

USER_ERROR_STATUS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessEvent:
    """What happened to a process: ``kind`` is starting, ready, restarting, left, stopped or failed."""

    server_id: str
    kind: str
    text: str
    exit_code: int = 0


class ServiceProcess:
    """Starts one service, waits for its ready line, and starts it again when it dies; all methods are thread-safe.

    A service that ends with 0 left on purpose and is not started again; one that ends with 2 (a user error) or fails
    ``FAILED_STARTS`` times before it was ``established`` is given up with a ``failed`` event. The process leads its own
    process group, writes stderr to ``log_file``, and ends when this process dies: its stdin is a pipe held open here.

    Args:
        command: gives the command line; asked again at every start.
        on_event: called from the keeper's thread.
        log_file: None = this process's stderr.
        log_size: after how much the log is rolled; None = never.
        stop_signal: what asks the process to end.
    """

    def __init__(
        self,
        *,
        role: str,
        server_id: str,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        log_file: Path | None,
        on_event: Callable[[ProcessEvent], None],
        restart: bool = True,
        log_size: LogSize | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.role = role
        self.id = server_id
        self.log_file = log_file
        self.restart = restart
        self.starts = 0
        self.address: str | None = None
        self.http_address: str | None = None
        self._command = command
        self._environment = dict(environment)
        self._on_event = on_event
        self._log_size = log_size
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[str] | None = None
        self.established = False
        """Set by the owner once the service has done its work: from then on it is never given up for dying."""
        self._is_ready = False  # the process that runs now
        self._stopping = threading.Event()
        self._may_start = threading.Event()
        self._may_start.set()
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name=f"keep {server_id}", daemon=True)

    @property
    def pid(self) -> int | None:
        """Of the running process; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        self._keeper.start()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the running process; nothing happens while there is none."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(number)

    def stop_restarting(self) -> None:
        """Whatever ends from now on stays ended."""
        self._stopping.set()
        self._may_start.set()  # nobody waits for a start that will not come

    def hold_restarts(self) -> None:
        """A process that ends is started again only after ``allow_restarts``."""
        self._may_start.clear()

    def allow_restarts(self) -> None:
        """What ended while restarts were held starts at once."""
        self._may_start.set()

    def begin_stop(self) -> None:
        """Ask it to end, and no restart. One that is not ready yet has nothing to finish, and hears nothing while it
        imports and compiles: it is killed."""
        self.stop_restarting()
        self.kill(self._stop_signal if self._is_ready else signal.SIGKILL)

    def finish_stop(self, timeout_s: float) -> bool:
        """Wait for the end that ``begin_stop`` asked for, then SIGKILL the group; False when it had to be killed."""
        if self._keeper.ident is None:
            return True
        self._keeper.join(timeout_s)
        if not self._keeper.is_alive():
            return True
        log.warning("%s did not stop within %.1f s: killed", self.id, timeout_s)
        self._kill_group()
        self._keeper.join(5.0)
        return False

    def _kill_group(self) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _keep(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        failed_starts = 0
        while not self._stopping.is_set():
            started_s = time.monotonic()
            log_offset = self.log_file.stat().st_size if self.log_file and self.log_file.exists() else 0
            with opened(self.log_file, self._log_size) as stderr:
                exit_code = self._run_once(stderr)
            if self._stopping.is_set():
                break
            if exit_code == 0 or not self.restart:
                self._tell("left", f"left ({_described(exit_code)})", exit_code)
                return
            failed_starts = 0 if self.established else failed_starts + 1
            if exit_code == USER_ERROR_STATUS or failed_starts >= FAILED_STARTS:
                self._tell("failed", self._last_words(log_offset, exit_code), exit_code)
                return
            if time.monotonic() - started_s > HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            self._tell("restarting", f"{_described(exit_code)}; starts again in {backoff_s:.1f} s", exit_code)
            self._stopping.wait(backoff_s)
            self._may_start.wait()
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        self._tell("stopped", "stopped")

    def _run_once(self, stderr: IO[Any]) -> int:
        with self._lock:
            if self._stopping.is_set():
                return 0
            self._is_ready = False
            self._process = process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._environment,
                process_group=0,
            )
        self.starts += 1
        self._tell("starting", f"starting (pid {process.pid})")
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                self._read_line(line)
            return process.wait()

    def _read_line(self, line: str) -> None:
        try:
            said = json.loads(line)
            self.address, self.http_address = said["address"], said.get("http")
        except (ValueError, KeyError, TypeError):
            log.warning("%s wrote to stdout: %s", self.id, line.rstrip())
            return
        self._is_ready = True
        self._tell("ready", f"ready on {self.address}")

    def _last_words(self, log_offset: int, exit_code: int) -> str:
        if self.log_file is None:
            return _described(exit_code)
        with self.log_file.open(encoding="utf-8", errors="replace") as lines:
            rolled = self.log_file.stat().st_size < log_offset
            lines.seek(0 if rolled else log_offset)
            words = lines.read().strip().splitlines()
        said = [line.removeprefix("error: ") for line in words if line.startswith("error: ")]
        return said[-1] if said else f"{_described(exit_code)}; {self.log_file} ends with:\n" + "\n".join(words[-20:])

    def _tell(self, kind: str, text: str, exit_code: int = 0) -> None:
        self._on_event(ProcessEvent(server_id=self.id, kind=kind, text=text, exit_code=exit_code))


def _described(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with {exit_code}"
