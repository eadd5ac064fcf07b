"""A service whose telemetry is switched while it runs: ``tracing_cost.py`` starts it in place of ``expertmesh serve``.

    python benchmarks/telemetry_switch.py FOLDER serve ROLE --id ID ...

It listens on the socket FOLDER/ID for JSON objects and answers each with one (``Switch.answer``). Switched off, every
tracer, metric and cell is an object of the class that it would have without telemetry, so what runs is the very code
that runs then, in a process that is otherwise the same. Threads that export are told apart by their own clocks, and
what requests and steps call of their telemetry is timed on the clock of the thread that calls it, switched on or off.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from expertmesh.cli.main import main
from expertmesh.mesh import telemetry as telemetry_room
from expertmesh.mesh.telemetry import Telemetry, instruments
from expertmesh.mesh.telemetry.prometheus import MetricsCollector

SPANS, METRICS, ENDPOINT, SWITCH = "OtelBatchSpanRecordProcessor", "otlp-metrics", "metrics-endpoint", "switch"
BACKGROUND = (SPANS, METRICS, ENDPOINT, SWITCH)
"""Names of the threads that do no work of a request or a step."""
_NULL_CELLS = {
    instruments.GaugeCell: instruments.Gauge,
    instruments.CounterCell: instruments.Counter,
    instruments.HistogramCell: instruments.Histogram,
}


class Sections:
    """The CPU time within the methods of some classes, on all threads; calls among them count once."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._threads: list[list[int]] = []  # of each: how deep it is in calls, nanoseconds

    def seconds(self) -> float:
        return sum(spent for _, spent in self._threads) / 1e9

    def time(self, owner: type) -> None:
        for name, member in list(vars(owner).items()):
            if isinstance(member, property) and member.fget is not None:
                setattr(owner, name, property(self.timed(member.fget)))
            elif callable(member):
                setattr(owner, name, self.timed(member))

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            own = getattr(self._local, "own", None) or self._enter()
            if own[0]:
                return function(*arguments, **keywords)
            own[0] = 1
            started_ns = time.thread_time_ns()
            try:
                return function(*arguments, **keywords)
            finally:
                own[1] += time.thread_time_ns() - started_ns
                own[0] = 0

        return run

    def _enter(self) -> list[int]:
        own = self._local.own = [0, 0]
        self._threads.append(own)
        return own


def sections_of(role: str) -> Sections:
    """What a service calls of its telemetry while requests and steps run."""
    sections = Sections()
    if role == "router":
        from expertmesh.router.spans import RequestTelemetry, TokenGaps

        for owner in (RequestTelemetry, TokenGaps):
            sections.time(owner)
    elif role != "balancer":
        from expertmesh.attention_server import service
        from expertmesh.attention_server.observe import RequestMetrics
        from expertmesh.attention_server.tracing import RequestTrace
        from expertmesh.mesh.stepclock import StepClock

        for owner in (RequestMetrics, RequestTrace, StepClock):
            sections.time(owner)
        service.trace_request = sections.timed(service.trace_request)
    return sections


class Switch:
    def __init__(self, telemetry: Telemetry, sections: Sections) -> None:
        self._telemetry = telemetry
        self._sections = sections
        self._tracer_class = type(telemetry.tracer)
        self._registry = CollectorRegistry()
        self._registry.register(MetricsCollector(telemetry.metrics))
        null = instruments.NULL
        self._off = {kind: null[kind] for kind in _NULL_CELLS.values()}
        self._off |= {cell: type(null[kind]("", (), ()).labels()) for cell, kind in _NULL_CELLS.items()}
        self._on = {off: on for on, off in self._off.items()}

    def answer(self, asked: dict[str, Any]) -> dict[str, float]:
        """Switch ``tracing`` and ``metrics``; the CPU seconds of this process so far, those of its telemetry among
        them, those of each background thread beside them, and what a ``scrape`` takes where one is asked for."""
        if "tracing" in asked:
            self._set(tracing=asked["tracing"], metrics=asked["metrics"])
        scrape_s = self._scrape() if "scrape" in asked else 0.0
        threads = {thread.name: thread.ident for thread in threading.enumerate() if thread.name in BACKGROUND}
        background = {
            name: time.clock_gettime(time.pthread_getcpuclockid(ident))
            for name, ident in threads.items()
            if ident is not None
        }
        return {
            **background,
            "cpu_s": time.process_time() - sum(background.values()),
            "telemetry_s": self._sections.seconds(),
            "scrape_s": scrape_s,
        }

    def _set(self, *, tracing: bool, metrics: bool) -> None:
        self._telemetry.tracing = tracing
        self._telemetry.tracer.__class__ = self._tracer_class if tracing else NoOpTracer
        classes = self._on if metrics else self._off
        for _, family, _ in self._telemetry.metrics.families():
            for thing in (family, *(cell for _, cell in family.series())):
                thing.__class__ = classes.get(type(thing), type(thing))

    def _scrape(self) -> float:
        started_s = time.thread_time()
        generate_latest(self._registry)
        return time.thread_time() - started_s


def listen(path: Path, switch: Switch) -> None:
    """Serve the benchmark, which connects once."""

    def serve() -> None:
        with Listener(str(path), "AF_UNIX") as listener, listener.accept() as connection:
            _answer_until_closed(connection, switch)

    threading.Thread(target=serve, name=SWITCH, daemon=True).start()


def _answer_until_closed(connection: Connection, switch: Switch) -> None:
    while True:
        try:
            asked = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(json.dumps(switch.answer(json.loads(asked))).encode())


def switched(folder: Path, setup: Callable[..., Telemetry]) -> Callable[..., Telemetry]:
    """``setup_telemetry``, and a switch for what it has made."""

    def setup_switched(config: Any, *, role: str, instance: str, **others: Any) -> Telemetry:
        made = setup(config, role=role, instance=instance, **others)
        listen(folder / instance, Switch(made, sections_of(role)))
        return made

    return setup_switched


if __name__ == "__main__":
    _, own_folder, *sys.argv[1:] = sys.argv
    telemetry_room.setup_telemetry = switched(Path(own_folder), telemetry_room.setup_telemetry)
    main()
