"""Compiling ahead of need, in the presence of another process that does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from expertmesh.kernels import warm_up


def test_a_process_that_hangs_in_its_compile_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(warm_up, "_is_cached", lambda: False)
    folder = os.open(Path(warm_up.__file__).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        warm_up.warm_up()
    finally:
        os.close(folder)
