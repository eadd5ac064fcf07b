"""The words of a side group: what goes where, how long anybody waits for it, and whether it came whole."""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import dataclass, replace

import torch

from expertmesh.mesh.halves import ExpertWeights


class TransferError(RuntimeError):
    """The weights did not come; ``cause`` is ``called_off``, ``broken`` or ``checksum``."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait: until a monotonic time, or until somebody calls it off, who also wakes the group."""

    called_off: threading.Event
    deadline_s: float

    @property
    def left_s(self) -> float:
        return 0.0 if self.called_off.is_set() else self.deadline_s - time.monotonic()

    def half(self) -> Patience:
        """With half of the time that is left: so that something else can be tried in the other half."""
        return replace(self, deadline_s=self.deadline_s - max(0.0, self.left_s) / 2)

    def anew(self, seconds: float) -> Patience:
        """With so much time from now on."""
        return replace(self, deadline_s=time.monotonic() + seconds)


@dataclass(frozen=True, slots=True)
class Take:
    """Transfer ``number`` of a plan comes from expert rank ``source`` into this memory."""

    number: int
    source: int
    into: ExpertWeights


@dataclass(frozen=True, slots=True)
class Give:
    """Transfer ``number`` of a plan goes to expert rank ``to``. The weights hold still until the plan is over."""

    number: int
    to: int
    weights: ExpertWeights


@dataclass(frozen=True, slots=True)
class Came:
    """How the weights of a transfer came: by ``tcp`` or ``nixl``, from their first byte to their last."""

    transport: str
    num_bytes: int
    seconds: float


def num_bytes_of(weights: ExpertWeights) -> int:
    return sum(part.nbytes for part in weights)


def bytes_of(part: torch.Tensor) -> memoryview:
    """Of a tensor on the host, without a copy."""
    assert part.is_contiguous(), "weights are transferred as they lie in memory"
    return part.view(torch.uint8).numpy().data.cast("B")


def checksum(weights: ExpertWeights) -> int:
    """CRC-32 over the bytes of all parts, which are on the host."""
    value = 0
    for part in weights:
        value = zlib.crc32(bytes_of(part), value)
    return value


def checksum_in_place(weights: ExpertWeights) -> int:
    """CRC-32 over the sums of all rows and columns of each part, taken where it is: of a device's memory no more than
    these sums come to the host. Rows are those of the part's first dimension, their elements 64 bits, wrapping, or
    bytes where they do not divide into these.
    """
    value = 0
    for part in weights:
        bytes_RB = part.reshape(len(part), -1).view(torch.uint8)
        is_even = bytes_RB.shape[1] % 8 == 0 and bytes_RB.storage_offset() % 8 == 0
        words_RW = bytes_RB.view(torch.int64) if is_even else bytes_RB
        sums = torch.cat([words_RW.sum(dim, dtype=torch.int64) for dim in (0, 1)])
        value = zlib.crc32(bytes_of(sums.cpu()), value)
    return value
