"""Weights from one expert rank to another, beside the data plane: over TCP links of their own that no step waits for.

The links are opened when the ranks of a view meet (``mesh/meet.py``), so that nothing here depends on the balancer. For
each transfer the destination asks the source as soon as it has the plan. The source, when it has the same plan, answers
with the weights and their checksum; when the plan is over there, that there will be none.

Either end may give a plan up whenever it pleases it. A transfer that fails costs that transfer, a link that breaks the
transfers between its two ranks, and those weights come from the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from expertmesh.mesh.framing import Waker
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.secure_stream import Stream
from expertmesh.mesh.sidelink import ASK, GIVE, REFUSE, Head, SideLink
from expertmesh.mesh.view import ViewInfo

log = logging.getLogger(__name__)

_BURST_S = 0.1
"""What the allowed rate lets go in so long goes at once: few long pauses wake fewer threads than many short ones."""
_SMALLEST_PIECE, _PIECE = 1 << 14, 1 << 20
"""Bytes handed to the kernel in one call."""
_HURRY_SHARE = 0.25
"""Of the time that a plan has: one whose weights would take longer at the allowed rate is sent faster."""


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


class SideGroup:
    """The expert ranks of one view as they hand weights to each other, one plan at a time.

    Ranks are expert-rank indices; the ids of plans go up. All methods but ``wake`` belong to one thread.

    Args:
        links: connected sockets to the other ranks; from now on this object's.
        bytes_per_s: what this rank sends at most, unless a plan would be late.
    """

    def __init__(self, links: Mapping[int, Stream], *, bytes_per_s: float) -> None:
        self._links = {index: SideLink(index, sock) for index, sock in links.items()}
        self._bytes_per_s = bytes_per_s
        self._waker = Waker()
        self._plan = 0
        self._is_over = True
        self._takes: dict[int, Take] = {}  # that have neither come nor failed
        self._gives: dict[int, Give] = {}  # that have not gone
        self._landing: dict[int, ExpertWeights] = {}  # where what is arriving goes: on the host
        self._failed: dict[int, TransferError] = {}
        self._early: set[tuple[int, int, int]] = set()  # (plan, number, who asks) of plans that are not here yet
        self._rate = bytes_per_s
        self._paid_s = 0.0  # when the rate has made up for what has gone
        self._resume_s = 0.0

    def wake(self) -> None:
        """Have patience looked at again; from any thread, at any time."""
        with contextlib.suppress(OSError):  # it is closed
            self._waker.wake()

    def begin(self, plan: int, takes: Iterable[Take], gives: Iterable[Give], patience: Patience) -> None:
        """Start the transfers of a plan, of the ``patience`` that there is for all of it; ``end`` it in any case."""
        assert self._is_over, "one plan at a time"
        self._plan, self._is_over, self._failed = plan, False, {}
        self._takes = {take.number: take for take in takes}
        self._gives = {give.number: give for give in gives}
        num_bytes = sum(part.nbytes for give in self._gives.values() for part in give.weights)
        self._rate = max(self._bytes_per_s, num_bytes / max(_HURRY_SHARE * patience.left_s, 1e-3))
        for take in self._takes.values():
            self._links[take.source].post(Head(ASK, plan, take.number))
        due = sorted(asked for asked in self._early if asked[0] <= plan)
        self._early.difference_update(due)
        for asked_plan, number, index in due:
            self._asked(self._links[index], asked_plan, number)

    def take(self, patience: Patience) -> dict[int, TransferError]:
        """Wait for what comes, and send meanwhile. Returns by number why some did not come: nothing writes to their
        memory any more."""
        self._run(self._takes, patience)
        for number in list(self._takes):
            self._fail(number, "it was called off or took too long", "called_off")
        return self._failed

    def give(self, patience: Patience) -> list[int]:
        """Wait until everything has gone. Returns the numbers of what has not."""
        self._run(self._gives, patience)
        return sorted(self._gives)

    def end(self) -> None:
        """The plan is over here: what has not begun to go is refused."""
        self._is_over = True
        for number in list(self._takes):
            self._fail(number, "the plan is over", "called_off")
        self._gives = {}
        for link in self._links.values():
            for head in link.withdraw():
                link.post(Head(REFUSE, head.plan, head.number))
            self._write(link)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._waker.close()

    # -- bytes --------------------------------------------------------------------------------------------------

    def _run(self, pending: Mapping[int, Take | Give], patience: Patience) -> None:
        """Move bytes until nothing is pending or patience is over."""
        while True:
            for link in self._links.values():
                self._write(link)
            self._drop_broken()
            left_s = patience.left_s
            if not pending or left_s <= 0:
                return
            pause_s = self._resume_s - time.monotonic()
            poller, links = select.poll(), {}
            poller.register(self._waker, select.POLLIN)
            for link in self._links.values():
                if link.broken:
                    continue
                waits = link.next_is_weights and pause_s > 0
                if waits:
                    left_s = min(left_s, pause_s)
                poller.register(link.sock, select.POLLIN | (select.POLLOUT if link.has_more and not waits else 0))
                links[link.sock.fileno()] = link
            for number, event in poller.poll(1e3 * left_s):
                if number not in links:
                    self._waker.clear()
                elif event & ~select.POLLOUT:
                    self._read(links[number])

    def _write(self, link: SideLink) -> None:
        """As much as the kernel takes and the rate allows."""
        piece = max(min(int(self._rate * _BURST_S), _PIECE), _SMALLEST_PIECE)
        while link.has_more:
            is_weights, now = link.next_is_weights, time.monotonic()
            if is_weights and now < self._resume_s:
                return
            count, gone = link.write(piece)
            if not count:
                return
            if is_weights:
                self._paid_s = max(self._paid_s, now) + count / self._rate
                self._resume_s = self._paid_s if self._paid_s - now >= _BURST_S else 0.0
            if gone is not None and gone.kind == GIVE and gone.plan == self._plan:
                self._gives.pop(gone.number, None)

    def _read(self, link: SideLink) -> None:
        for head in link.read(lambda head: self._place(link, head)):
            if head.kind == ASK:
                self._asked(link, head.plan, head.number)
            elif head.kind == GIVE:
                self._came(link, head)
            elif self._taken_from(link, head) is not None:
                self._fail(head.number, f"expert rank {link.index} has given the plan up", "called_off")

    def _drop_broken(self) -> None:
        """Nobody waits for a rank that has gone."""
        for link in self._links.values():
            if link.broken:
                for number in [take.number for take in self._takes.values() if take.source == link.index]:
                    self._fail(number, f"the link to expert rank {link.index} is broken: {link.broken}", "broken")
                for number in [give.number for give in self._gives.values() if give.to == link.index]:
                    log.warning("expert rank %d gets nothing: the link is broken: %s", link.index, link.broken)
                    del self._gives[number]

    # -- messages -----------------------------------------------------------------------------------------------

    def _asked(self, link: SideLink, plan: int, number: int) -> None:
        give = self._gives.get(number) if plan == self._plan and not self._is_over else None
        if plan > self._plan:
            self._early.add((plan, number, link.index))
        elif give is not None and give.to == link.index:
            weights = tuple(part.cpu() for part in give.weights)
            views = [_bytes_of(part) for part in weights]
            num_bytes = sum(len(view) for view in views)
            link.post(Head(GIVE, plan, number, checksum(weights), num_bytes), views)
        else:
            link.post(Head(REFUSE, plan, number))

    def _taken_from(self, link: SideLink, head: Head) -> Take | None:
        """The transfer of the plan that this is about, as long as it is wanted."""
        take = self._takes.get(head.number) if head.plan == self._plan else None
        return take if take is not None and take.source == link.index else None

    def _place(self, link: SideLink, head: Head) -> Sequence[memoryview]:
        take = self._taken_from(link, head) if head.kind == GIVE else None
        if take is None:
            return ()
        size = sum(part.nbytes for part in take.into)
        if size == head.num_bytes:
            landing = tuple(part if part.is_cpu else torch.empty_like(part, device="cpu") for part in take.into)
            self._landing[head.number] = landing
            return [_bytes_of(part) for part in landing]
        what = f"expert rank {link.index} sends {head.num_bytes} bytes instead of {size}"
        self._fail(head.number, what, "checksum")
        return ()

    def _came(self, link: SideLink, head: Head) -> None:
        take = self._taken_from(link, head)
        if take is None:
            return
        landing = self._landing.pop(head.number)
        found = checksum(landing)
        if found == head.checksum:
            del self._takes[head.number]
            for part, host in zip(take.into, landing, strict=True):
                if part is not host:
                    part.copy_(host)
        else:
            what = f"what expert rank {link.index} sent has checksum {found}, not {head.checksum}"
            self._fail(head.number, what, "checksum")

    def _fail(self, number: int, what: str, cause: str) -> None:
        take = self._takes.pop(number)
        self._landing.pop(number, None)
        self._links[take.source].scrap(self._plan, number)
        self._failed[number] = TransferError(what, cause)


def open_side_group(view: ViewInfo, links: Mapping[int, Stream], bytes_per_s: float) -> SideGroup:
    """The side group of a view's expert ranks, of which this rank is one; ``links`` by the peer's rank."""
    assert view.expert_index is not None, "only expert ranks hand weights to each other"
    index = {rank: i for i, rank in enumerate(view.expert_ranks)}
    return SideGroup({index[rank]: sock for rank, sock in links.items()}, bytes_per_s=bytes_per_s)


def checksum(weights: ExpertWeights) -> int:
    """CRC-32 over the bytes of all parts."""
    value = 0
    for part in weights:
        value = zlib.crc32(_bytes_of(part), value)
    return value


def _bytes_of(part: torch.Tensor) -> memoryview:
    assert part.is_contiguous(), "weights are transferred as they lie in memory"
    return part.view(torch.uint8).numpy().data.cast("B")
