"""What a failing GPU or peer looks like to the host, as the errors that the step thread knows.

A CUDA error such as a kernel's trap is sticky: every later call of the process fails with it, and nothing but a new
process helps. DeepEP's kernels trap when a peer is silent for longer than their time-out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from expertmesh.mesh.errors import DeviceLostError

_MARKS = ("CUDA error", "CUDA runtime exception", "CUDA driver exception", "cudaError", "CUDA_ERROR")
_SPIN_S = 0.0005  # a step that is about to end is polled without pause
_PAUSE_S = 0.0001


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


def wait_for_device(timeout_s: float, on_timeout: Callable[[], Exception]) -> None:
    """Wait until the current stream has done what is enqueued on it; other threads run meanwhile.

    Args:
        on_timeout: what to raise after ``timeout_s``.

    Raises:
        DeviceLostError: something enqueued has failed.
    """
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
    try:
        event.record()
        began = time.monotonic()
        while not event.query():  # type: ignore[no-untyped-call]  # torch's
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                raise on_timeout()
            if waited_s > _SPIN_S:
                time.sleep(_PAUSE_S)
    except RuntimeError as error:
        lost = as_device_lost(error)
        if lost is None or lost is error:
            raise
        raise lost from error
