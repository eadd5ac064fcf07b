"""What a person sees while a mesh starts: a live table on a terminal, plain lines otherwise; always on stderr."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from expertmesh.cli.process import ProcessEvent

MARKS = {"ready": "[green]✓[/]", "restarting": "[yellow]↻[/]", "failed": "[red]✗[/]", "left": "–", "stopped": "–"}


class Progress(Protocol):
    """Shows process events and remarks; called from several threads."""

    def event(self, event: ProcessEvent) -> None: ...

    def say(self, text: str) -> None: ...

    def starting(self) -> AbstractContextManager[Any]:
        """While the mesh starts."""


class PlainProgress:
    """One line an event, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_s = time.monotonic()

    def event(self, event: ProcessEvent) -> None:
        # Starts are announced as a whole, and at the end only what did not stop by itself is worth a line.
        if event.kind in ("ready", "restarting", "failed", "left"):
            self.say(f"{event.server_id} {event.text}")

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._started_s:5.1f} s] {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def starting(self) -> AbstractContextManager[Any]:
        return nullcontext()


class LiveProgress:
    """A table with a row a service while the mesh starts, plain lines afterwards."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = PlainProgress(console)
        self._started_s = time.monotonic()
        self._rows: dict[str, tuple[ProcessEvent, float]] = {}
        self._live: Live | None = None

    def event(self, event: ProcessEvent) -> None:
        if self._live is None:
            self._lines.event(event)
        self._rows[event.server_id] = (event, time.monotonic() - self._started_s)

    def say(self, text: str) -> None:
        self._lines.say(text)

    def starting(self) -> AbstractContextManager[Any]:
        return _Table(self)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for event, at_s in list(self._rows.values()):
            mark = MARKS.get(event.kind) or Spinner("dots")
            table.add_row(mark, event.server_id, f"[dim]{event.text}[/]", f"[dim]{at_s:.1f} s[/]")
        return table


class _Table(AbstractContextManager["_Table"]):
    def __init__(self, progress: LiveProgress) -> None:
        self._progress = progress

    def __enter__(self) -> _Table:
        progress = self._progress
        progress._live = Live(get_renderable=progress._table, console=progress._console, refresh_per_second=10)
        progress._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        live, self._progress._live = self._progress._live, None
        assert live is not None
        live.stop()


def progress_for(console: Console) -> Progress:
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)
