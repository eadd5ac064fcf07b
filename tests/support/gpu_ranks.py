"""Processes with a GPU each, which run functions together as the ranks of a view.

Imports no more than torch and the planes, so that it runs on a machine that has little else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # not in torch's __all__

from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.factory import open_on_device

ANSWER_S = 400.0


@dataclass
class Rank:
    """What a function finds in its process. ``view``: number of the call. ``keep`` lives as long as the process."""

    rank: int
    size: int
    store: Store
    device: torch.device
    view: int = 0
    keep: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlaneConfig:
    """The part of ``DataPlaneConfig`` that a device plane reads: pydantic may be missing here."""

    backend: str
    timeout_s: float = 5.0
    num_sms: int | None = None
    fp8_dispatch: bool = False


class RankError(RuntimeError):
    """A function failed in a rank; the message is its traceback. ``died`` = the process has gone."""

    def __init__(self, message: str, died: bool = False) -> None:
        super().__init__(message)
        self.died = died


class Ranks:
    """``size`` processes, rank r on GPU r. A process that died can be started again."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.view = 0
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = [None] * size
        self._pipes: list[Connection] = [self._start(rank) for rank in range(size)]

    def _start(self, rank: int) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(rank, self.size, self.server.port, theirs), daemon=True, name=f"rank-{rank}"
        )
        process.start()
        theirs.close()
        self._processes[rank] = process
        return ours

    def restart(self, rank: int) -> None:
        """A new process for a rank whose process has ended."""
        self._pipes[rank].close()
        self._processes[rank].join(30)
        self._pipes[rank] = self._start(rank)

    def kill(self, rank: int) -> None:
        os.kill(self._processes[rank].pid, signal.SIGKILL)
        self._processes[rank].join(30)

    def exit_status(self, rank: int, timeout_s: float) -> int | None:
        self._processes[rank].join(timeout_s)
        status: int | None = self._processes[rank].exitcode
        return status

    def send(self, rank: int, function: Callable[..., Any], *args: Any) -> None:
        """Call it in one rank, as part of the view that the last ``run`` began."""
        self._pipes[rank].send((self.view, function, args))

    def answer(self, rank: int, timeout_s: float = ANSWER_S) -> Any:
        """What the function returned.

        Raises:
            RankError: it failed, or the process died.
        """
        pipe = self._pipes[rank]
        if not pipe.poll(timeout_s):
            raise RankError(f"rank {rank} did not answer within {timeout_s:g} s")
        try:
            is_good, result = pipe.recv()
        except EOFError:
            raise RankError(f"rank {rank} died", died=True) from None
        if not is_good:
            raise RankError(f"rank {rank}: {result}")
        return result

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(Rank, *args)`` in all of them at the same time, as a new view; their results."""
        self.view += 1
        for rank in range(self.size):
            self.send(rank, function, *args)
        results: list[Any] = []
        for rank in range(self.size):
            try:
                results.append(self.answer(rank))
            except RankError as error:  # the others' answers must not be taken for those of the next call
                results.append(error)
        for result in results:
            if isinstance(result, RankError):
                raise result
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


@contextmanager
def gpu_ranks(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    own = Rank(rank, size, store, device)
    while True:
        try:
            own.view, function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            with torch.inference_mode():
                result = (True, function(own, *args))
        except BaseException:  # noqa: BLE001 - told to the test
            result = (False, traceback.format_exc())
            print(f"rank {rank}: {result[1]}", file=sys.stderr, flush=True)  # others may wait for it still
        pipe.send(result)


def plane_of(rank: Rank, config: PlaneConfig, shape: PlaneShape) -> Any:
    """The plane of these settings; one that was opened in an earlier view is kept."""
    key = config, shape
    if key not in rank.keep:
        store = PrefixStore(f"view/{rank.view}/{len(rank.keep)}/", rank.store)
        nodes = ["node"] * rank.size
        rank.keep[key] = open_on_device(config, store, shape, rank.device, nodes, 120.0)  # type: ignore[arg-type]
    return rank.keep[key]


def close_planes(rank: Rank) -> None:
    for plane in rank.keep.values():
        plane.close()
    rank.keep.clear()
    torch.cuda.empty_cache()


def free_bytes(rank: Rank) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
