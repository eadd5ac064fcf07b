"""An NCCL group of a view's ranks, without torch.distributed's default group: many views may come and go."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import AllToAllOptions, PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]  # public, but not in torch's __all__

from expertmesh.mesh.errors import DataPlaneError, DeviceLostError

log = logging.getLogger(__name__)

T = TypeVar("T")

_LEAVE_S = 0.5
"""How long a rank that leaves waits for the others. They leave within a step of each other, or not at all."""

_ABORT_S = 10.0
"""How long connections may take to be dropped: some tenths of a second, as a rule."""

_PAUSE_S = 0.005
_LOOK_S = 0.05

_ENVIRONMENT = {
    # The planes watch the time themselves. The group's own watchdog would end the whole process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    # Switch multicast is not used: a program that ends in the middle of it can leave the links of a node unusable.
    "NCCL_NVLS_ENABLE": "0",
}


@dataclass(frozen=True, slots=True)
class NcclGroup:
    """Connected ranks. ``backend`` has the operations, ``group`` is what libraries take."""

    group: ProcessGroup
    backend: Any
    store: Store
    rank: int
    size: int

    def exchange(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        """Send ``inputs[r]`` to rank r and receive ``outputs[r]`` from it; empty = nothing."""
        return self.backend.alltoall(outputs, inputs, AllToAllOptions())

    def agree(self, name: str, timeout_s: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Whether all ranks come to the same point within the time, and before ``is_over`` says that none will."""
        return agree(self.store, name, self.rank, self.size, timeout_s, is_over)

    def leave(self) -> bool:
        """Whether all ranks are leaving: then nothing of theirs uses this rank's memory any more."""
        return self.agree("leave", _LEAVE_S)

    def abort(self) -> None:
        """Drop the connections at once; whatever runs on the device ends with an undefined result."""
        with contextlib.suppress(RuntimeError):  # it failed before: nothing is left to be dropped
            self.backend.abort()


class Abort:
    """Drops connections on a thread of its own: NCCL may wait for graphs that have its exchanges in them to be dropped,
    or without end for a peer that died.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._began = time.monotonic()
        self._thread = threading.Thread(target=abort, name="nccl-abort", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until they are dropped.

        Raises:
            DeviceLostError: they were not, within 10 s: what they hold of the device is lost to this process.
        """
        self._thread.join(_ABORT_S)
        if self._thread.is_alive():
            raise DeviceLostError(f"NCCL did not drop its connections within {_ABORT_S:g} s")
        log.info("NCCL connections dropped in %.0f ms", 1e3 * (time.monotonic() - self._began))


def agree(
    store: Store, name: str, rank: int, size: int, timeout_s: float, is_over: Callable[[], bool] = lambda: False
) -> bool:
    """Whether all ranks of a store come to the same point within the time; False too when the store has gone."""
    keys, deadline_s = [f"{name}/{other}" for other in range(size)], time.monotonic() + timeout_s
    try:
        store.set(keys[rank], "")
        while not store.check(keys):
            if time.monotonic() > deadline_s or is_over():
                return False
            time.sleep(_PAUSE_S)
    except RuntimeError:  # torch.distributed's errors derive from it
        return False
    return True


def connect_nccl(
    store: Store,
    rank: int,
    size: int,
    device: torch.device,
    timeout_s: float,
    is_over: Callable[[], bool] = lambda: False,
) -> NcclGroup:
    """Connect all ranks over NCCL. Blocks until they have come.

    Args:
        store: its keys are this group's alone.
        device: this rank's GPU.
        timeout_s: how long they may take; a process that starts again comes later than the others.
        is_over: says that they will not come any more.

    Raises:
        DataPlaneError: they did not all come, or NCCL failed.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    began = time.monotonic()
    store.set_timeout(timedelta(seconds=timeout_s))
    group = within(
        timeout_s, device, "connecting over NCCL", lambda: _connect(store, rank, size, device, timeout_s), is_over
    )
    log.info("NCCL group of %d ranks in %.0f ms", size, 1e3 * (time.monotonic() - began))
    return group


def _connect(store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> NcclGroup:
    # Imported here: torch's builds for the CPU do not have it.
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    backend = ProcessGroupNCCL(PrefixStore("nccl/", store), rank, size, options)
    backend._set_sequence_number_for_group()
    group = ProcessGroup(PrefixStore("group/", store), rank, size)
    group._set_default_backend(ProcessGroup.BackendType.NCCL)
    group.bound_device_id = device
    group._register_backend(torch.device("cuda"), ProcessGroup.BackendType.NCCL, backend)
    backend.eager_connect_single_device(device)
    return NcclGroup(group, backend, PrefixStore("agree/", store), rank, size)


def within(
    timeout_s: float,
    device: torch.device,
    what: str,
    function: Callable[[], T],
    is_over: Callable[[], bool] = lambda: False,
) -> T:
    """``function()`` on a thread of its own: NCCL waits without end for a rank that died while it connects.

    Raises:
        DataPlaneError: it failed, took longer, or ``is_over`` says that it will not end; then the thread stays behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised below, where someone waits for it
            errors.append(error)

    thread = threading.Thread(target=run, name="nccl-connect", daemon=True)
    thread.start()
    deadline_s = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline_s and not is_over():
        thread.join(_LOOK_S)
    if errors:
        if not isinstance(errors[0], RuntimeError) or isinstance(errors[0], DataPlaneError):
            raise errors[0]
        raise DataPlaneError(f"{what} failed: {errors[0]}") from errors[0]
    if not results:
        why = "a newer view is known" if time.monotonic() < deadline_s else f"{timeout_s:g} s are over"
        raise DataPlaneError(f"{what} was given up: {why}")
    return results[0]
