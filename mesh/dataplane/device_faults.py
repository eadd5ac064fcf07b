"""What a failing GPU or peer looks like to the host, as the errors that the step thread knows.

A CUDA error such as a kernel's trap is sticky: every later call of the process fails with it, and nothing but a new
process helps. DeepEP's kernels trap when a peer is silent for longer than their time-out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from expertmesh.mesh.errors import DataPlaneError, DeviceLostError

_MARKS = ("CUDA error", "CUDA runtime exception", "CUDA driver exception", "cudaError", "CUDA_ERROR")
_PAUSE_S = 0.00005
"""Between two looks at the device. A step's tokens are waited for while the next step runs: this holds nothing up."""


def as_device_lost(error: BaseException) -> DeviceLostError | None:
    """The error of a lost CUDA context, None when this is something else: out of memory is."""
    if isinstance(error, DeviceLostError):
        return error
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    if not isinstance(error, torch.AcceleratorError) and not any(mark in str(error) for mark in _MARKS):
        return None
    reason = str(error).strip().splitlines()[0]
    return DeviceLostError(f"the CUDA context of this process is gone, probably because a peer was silent: {reason}")


class DeviceWait:
    """Waits until the device has come to an event, as long as it may; other threads run meanwhile.

    Args:
        on_failure: what to raise, with why, when nothing is waited for any more.
    """

    def __init__(self, timeout_s: float, on_failure: Callable[[str], DataPlaneError]) -> None:
        self._timeout_s = timeout_s
        self._on_failure = on_failure
        self._is_abandoned = threading.Event()

    def abandon(self) -> None:
        """End a wait under way, and every later one, at once; from any thread."""
        self._is_abandoned.set()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Wait for an event, None = the end of what is enqueued on the current stream.

        Raises:
            DeviceLostError: something enqueued has failed.
        """
        try:
            if event is None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
                event.record()
            began = time.monotonic()
            while not event.query():  # type: ignore[no-untyped-call]  # torch's
                if self._is_abandoned.is_set():
                    raise self._on_failure("a newer view is out")
                if time.monotonic() - began > self._timeout_s:
                    raise self._on_failure(f"a rank was silent for {self._timeout_s:g} s in the middle of a step")
                time.sleep(_PAUSE_S)
        except RuntimeError as error:
            lost = as_device_lost(error)
            if lost is None or lost is error:
                raise
            raise lost from error
