"""Priorities of threads: of the steps, and of work that can wait for them (migrations, searches for placements)."""

from __future__ import annotations

import contextlib
import os


def only_idle_cores() -> None:
    """Let the calling thread run only where a core has nothing else to do, and leave it as soon as it has.

    For long computations without the interpreter's lock, where no steps are made. A thread of ordinary priority,
    however nice, keeps its core for a whole time slice when a step thread wakes up (those run under SCHED_BATCH, which
    preempts nothing but SCHED_IDLE): some milliseconds in each exchange of a layer.
    """
    _schedule("SCHED_IDLE")


def preempt_nobody() -> None:
    """Let the calling thread wait for its turn when it wakes up.

    For step threads: where there are fewer cores than ranks, Linux would else let a peer that is woken by a message
    have the sender's core at once, in the middle of sending to several of them.

    And for short pieces of work in the process of a step thread: under SCHED_IDLE it might hold the interpreter's lock
    without getting a core, on a machine that others keep busy, and the step with it. Threads that it starts inherit it.
    """
    _schedule("SCHED_BATCH")


def _schedule(policy: str) -> None:
    if hasattr(os, policy):
        with contextlib.suppress(OSError):  # a sandbox may forbid it: only speed is lost
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
