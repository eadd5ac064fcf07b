"""The reads of a side group: which are under way, which have ended, and which nobody waits for any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.nixl_reads import Reading
from expertmesh.mesh.side_transfers import Take, TransferError
from expertmesh.mesh.sidelink import Head

if TYPE_CHECKING:  # side groups are tested where pydantic is missing
    from expertmesh.mesh.weight_reads import WeightReads

_GRACE_S = 5.0
"""A destination that was late may end its read so long after the plan."""


@dataclass(frozen=True, slots=True)
class Read:
    """A transfer that is read since its offer, ``head``, has come."""

    head: Head
    take: Take
    reading: Reading

    @property
    def error(self) -> BaseException | None:
        """Why it failed, once it has ended."""
        return self.reading.result.exception(timeout=0)


class SideReads:
    """Of one group; its methods belong to the group's thread.

    Args:
        reads: None = weights come over the links alone.
        wake: called, in another thread, when a read has ended.
    """

    def __init__(self, reads: WeightReads | None, wake: Callable[[], None]) -> None:
        self._reads = reads
        self._wake = wake
        self._may_begin: Callable[[], bool] = lambda: True
        self._under_way: dict[int, Read] = {}
        self._leaving: dict[int, Read] = {}
        self._unfit: set[int] = set()
        self._lent: set[tuple[int, int]] = set()

    # -- destination --------------------------------------------------------------------------------------------

    @property
    def leaving(self) -> Mapping[int, Read]:
        """Reads of this plan that were given up, by number, and may still write to their memory."""
        return self._leaving

    def begin_plan(self) -> None:
        """What is to be read into is spare from now on."""
        self._leaving = {}
        if self._reads is not None:
            self._may_begin = self._reads.quiet()

    def can_read_from(self, source: int) -> bool:
        return self._reads is not None and source not in self._unfit

    def avoid(self, source: int) -> None:
        """Its weights come over the link from now on: reads of it cost time for nothing."""
        self._unfit.add(source)

    def begin(self, head: Head, take: Take, ticket: bytes) -> None:
        """
        Raises:
            TransferError: the ticket is not for this transfer.
        """
        if self._reads is None:
            raise TransferError("an offer that nobody asked for", "checksum")
        reading = self._reads.read(ticket, take.into, self._may_begin)
        self._under_way[take.number] = Read(head, take, reading)
        for future in (reading.result, reading.over):
            future.add_done_callback(lambda _: self._wake())

    def is_under_way(self, number: int) -> bool:
        return number in self._under_way

    def ended(self) -> Iterator[Read]:
        """Those that have ended since it was asked last: nothing writes to their memory any more."""
        for number, read in list(self._under_way.items()):
            if read.reading.result.done() and read.reading.over.done():
                del self._under_way[number]
                yield read
        for number, read in list(self._leaving.items()):
            if read.reading.over.done():
                del self._leaving[number]

    def give_up(self, number: int) -> None:
        """Nobody waits for this transfer any more, if it is being read."""
        read = self._under_way.pop(number, None)
        if read is not None:
            read.reading.abandon()
            self._leaving[number] = read

    # -- source -------------------------------------------------------------------------------------------------

    def ticket(self, weights: ExpertWeights) -> bytes | None:
        """What the destination needs to read this expert; None = it has to go over the link."""
        return self._reads.ticket(weights) if self._reads is not None else None

    def lend(self, plan: int, number: int, deadline_s: float) -> None:
        """The destination has its ticket: it reads until it is done or the plan's time is over."""
        assert self._reads is not None, "it was offered"
        self._lent.add((plan, number))
        self._reads.lend((self, plan, number), deadline_s + _GRACE_S)

    def take_back(self, plan: int, number: int) -> None:
        """The destination is done with it, if it was lent."""
        if self._reads is not None and (plan, number) in self._lent:
            self._lent.remove((plan, number))
            self._reads.take_back((self, plan, number))
