"""The point-to-point transfers of two micro-batches under way, and the errors of their peers."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch

from expertmesh.mesh.errors import DataPlaneError

MICRO_BATCHES = 2
_TAGS = 2  # of a micro-batch


class Kind(enum.IntEnum):
    """What a transfer belongs to; each has a tag of its own in each micro-batch."""

    DISPATCH = 1
    COMBINE = 2


class Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class PointToPoint(Protocol):
    """What is needed of a process group."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...


@dataclass(frozen=True, slots=True)
class Transfer:
    work: Work
    peer: int


class Transfers:
    """Those of one rank. A tensor must hold still until its transfer is over."""

    def __init__(self, group: PointToPoint, timeout_s: float) -> None:
        self._group: PointToPoint | None = group
        self._timeout = timedelta(seconds=timeout_s)
        self._sends: list[list[Transfer]] = [[] for _ in range(MICRO_BATCHES)]

    def send(self, tensor: torch.Tensor, peer: int, kind: Kind, micro_batch: int) -> None:
        """Over with ``finish_sends``.

        Raises:
            DataPlaneError: the peer failed.
        """
        assert self._group is not None, "the plane is closed"
        try:
            work = self._group.send([tensor], peer, _tag(kind, micro_batch))
        except RuntimeError as error:
            raise DataPlaneError(f"sending to rank {peer} failed: {error}", (peer,)) from error
        self._sends[micro_batch].append(Transfer(work, peer))

    def receive(self, tensor: torch.Tensor, peer: int, kind: Kind, micro_batch: int) -> Transfer:
        """Over with ``wait``.

        Raises:
            DataPlaneError: the peer failed.
        """
        assert self._group is not None, "the plane is closed"
        try:
            return Transfer(self._group.recv([tensor], peer, _tag(kind, micro_batch)), peer)
        except RuntimeError as error:
            raise DataPlaneError(f"receiving from rank {peer} failed: {error}", (peer,)) from error

    def wait(self, transfer: Transfer) -> None:
        """
        Raises:
            DataPlaneError: its peer failed or was silent for the time-out.
        """
        try:
            transfer.work.wait(self._timeout)
        except RuntimeError as error:
            raise DataPlaneError(f"the transfer with rank {transfer.peer} failed: {error}", (transfer.peer,)) from error

    def finish_sends(self, micro_batch: int) -> None:
        """A micro-batch's dispatch and combine are over when what this rank sent has gone: peers wait for it, and
        nothing else would send the rest while this rank waits elsewhere.

        Those of the other micro-batch may have to wait for this one on their way.
        """
        sends, self._sends[micro_batch] = self._sends[micro_batch], []
        for transfer in sends:
            self.wait(transfer)

    def close(self) -> None:
        """Nothing is waited for."""
        for sends in self._sends:
            sends.clear()
        self._group = None


def _tag(kind: Kind, micro_batch: int) -> int:
    return kind + _TAGS * micro_batch
