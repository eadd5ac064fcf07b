"""Signals reach the launcher even where a handler that raises would be swallowed."""

from __future__ import annotations

import os
import queue
import signal

from expertmesh.cli.signals import SignalWatch


def test_signal_inside_a_finaliser_is_not_lost() -> None:
    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    seen: queue.SimpleQueue[signal.Signals] = queue.SimpleQueue()
    with SignalWatch(seen.put):
        interrupted = Interrupted()
        del interrupted
        assert seen.get(timeout=5) is signal.SIGTERM


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with SignalWatch(lambda number: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
