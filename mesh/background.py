"""Threads whose work can wait: migrations, searches for better placements."""

from __future__ import annotations

import contextlib
import os


def only_idle_cores() -> None:
    """Let the calling thread run only where a core has nothing else to do, and leave it as soon as it has.

    A thread of ordinary priority, however nice, keeps its core for a whole time slice when a step thread wakes up
    (those run under SCHED_BATCH, which preempts nothing but SCHED_IDLE): some milliseconds in each exchange of a layer.
    A wait for the interpreter's lock, which such a thread may hold, ends when the cores are idle for want of that wait.
    """
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it: only speed is lost
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
