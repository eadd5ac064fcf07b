"""Weights from one expert rank to another, beside the data plane: over TCP links of their own that no step waits for.

The links are opened when the ranks of a view meet (``mesh/meet.py``), so that nothing here depends on the balancer. For
each transfer the destination asks the source as soon as it has the plan. The source, when it has the same plan, answers
with the weights and their checksum; when the plan is over there, that there will be none. Where both have NIXL
(``weight_reads``) the answer is a ticket instead, with which the destination reads the weights by itself, and says so.

Either end may give a plan up whenever it pleases it. A transfer that fails costs that transfer, a link that breaks the
transfers between its two ranks, and those weights come from the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from expertmesh.mesh.framing import Waker
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.pace import Pace
from expertmesh.mesh.secure_stream import Stream
from expertmesh.mesh.side_reads import Read, SideReads
from expertmesh.mesh.side_transfers import (
    Came,
    Give,
    Patience,
    Take,
    TransferError,
    bytes_of,
    checksum,
    checksum_in_place,
    num_bytes_of,
)
from expertmesh.mesh.sidelink import ASK, ASK_TO_READ, DONE, GIVE, MAX_TICKET_BYTES, OFFER, REFUSE, Head, SideLink
from expertmesh.mesh.view import ViewInfo

if TYPE_CHECKING:  # side groups are tested where pydantic is missing
    from expertmesh.mesh.weight_reads import WeightReads

log = logging.getLogger(__name__)

_HURRY_SHARE = 0.25
"""Of the time that a plan has: one whose weights would take longer at the allowed rate is sent faster."""
_LAST_READS_S = 1.0
"""A read that was given up may take so long to end before its memory is given up too."""


class SideGroup:
    """The expert ranks of one view as they hand weights to each other, one plan at a time.

    Ranks are expert-rank indices; the ids of plans go up. All methods but ``wake`` belong to one thread.

    Args:
        links: connected sockets to the other ranks; from now on this object's.
        bytes_per_s: what this rank sends, or lets others read, at most, unless a plan would be late.
        reads: where weights may be read instead of sent; the caller's to close.
    """

    def __init__(self, links: Mapping[int, Stream], *, bytes_per_s: float, reads: WeightReads | None = None) -> None:
        self._links = {index: SideLink(index, sock) for index, sock in links.items()}
        self._pace = Pace(bytes_per_s)
        self._waker = Waker()
        self._reads = SideReads(reads, self.wake)
        self._plan = 0
        self._is_over = True
        self._deadline_s = 0.0
        self._takes: dict[int, Take] = {}  # that have neither come nor failed
        self._gives: dict[int, Give] = {}  # that have not gone
        self._landing: dict[int, tuple[ExpertWeights, float]] = {}  # where what arrives goes, on the host; since when
        self._tickets: dict[int, bytearray] = {}
        self._failed: dict[int, TransferError] = {}
        self._early: set[tuple[int, int, int, int]] = set()  # (plan, number, who asks, how) of plans not here yet
        self.came: dict[int, Came] = {}
        """How those transfers of the plan that came did."""

    @property
    def leaving(self) -> Mapping[int, Read]:
        """Transfers of the plan that did not come and whose memory may be written to for a while yet."""
        return self._reads.leaving

    def wake(self) -> None:
        """Have patience looked at again; from any thread, at any time."""
        with contextlib.suppress(OSError):  # it is closed
            self._waker.wake()

    def begin(self, plan: int, takes: Iterable[Take], gives: Iterable[Give], patience: Patience) -> None:
        """Start the transfers of a plan, of the ``patience`` that there is for all of it; ``end`` it in any case."""
        assert self._is_over, "one plan at a time"
        self._plan, self._is_over, self._failed, self.came = plan, False, {}, {}
        self._deadline_s = patience.deadline_s
        self._takes = {take.number: take for take in takes}
        self._gives = {give.number: give for give in gives}
        num_bytes = sum(num_bytes_of(give.weights) for give in self._gives.values())
        self._pace.hurry(num_bytes / max(_HURRY_SHARE * patience.left_s, 1e-3))
        self._reads.begin_plan()
        for take in self._takes.values():
            kind = ASK_TO_READ if self._reads.can_read_from(take.source) else ASK
            self._links[take.source].post(Head(kind, plan, take.number))
        due = sorted(asked for asked in self._early if asked[0] <= plan)
        self._early.difference_update(due)
        for asked_plan, number, index, kind in due:
            self._asked(self._links[index], Head(kind, asked_plan, number))

    def take(self, patience: Patience) -> dict[int, TransferError]:
        """Wait for what comes, and send meanwhile. Returns by number why some did not come: but for those that are
        ``leaving``, nothing writes to their memory any more."""
        self._run(self._takes, patience)
        for number in list(self._takes):
            self._fail(number, "it was called off or took too long", "called_off")
        self._run(self._reads.leaving, patience.anew(_LAST_READS_S))
        if not patience.called_off.is_set():
            for read in self._reads.leaving.values():
                self._reads.avoid(read.take.source)
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

    def _run(self, pending: Mapping[int, Take | Give | Read], patience: Patience) -> None:
        """Move bytes until nothing is pending or patience is over."""
        while True:
            for read in self._reads.ended():
                self._was_read(read)
            for link in self._links.values():
                self._write(link)
            self._drop_broken()
            left_s = patience.left_s
            if not pending or left_s <= 0:
                return
            pause_s = self._pace.resume_s - time.monotonic()
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
        while link.has_more:
            is_weights, now = link.next_is_weights, time.monotonic()
            if is_weights and now < self._pace.resume_s:
                return
            count, gone = link.write(self._pace.piece)
            if not count:
                return
            if is_weights:
                self._pace.pay(count, now)
            if gone is not None and gone.plan == self._plan and gone.number in self._gives:
                if gone.kind == GIVE:
                    del self._gives[gone.number]
                elif gone.kind == OFFER:
                    self._pace.pay(num_bytes_of(self._gives[gone.number].weights), now)
                    self._reads.lend(gone.plan, gone.number, self._deadline_s)

    def _read(self, link: SideLink) -> None:
        for head in link.read(lambda head: self._place(link, head)):
            if head.kind in (ASK, ASK_TO_READ):
                self._asked(link, head)
            elif head.kind == GIVE:
                self._came(link, head)
            elif head.kind == OFFER:
                self._offered(link, head)
            elif head.kind == DONE:
                self._done(link, head)
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
                    self._reads.take_back(self._plan, number)
                    del self._gives[number]

    # -- messages -----------------------------------------------------------------------------------------------

    def _asked(self, link: SideLink, head: Head) -> None:
        plan, number = head.plan, head.number
        give = self._given_to(link, head)
        if plan > self._plan:
            self._early.add((plan, number, link.index, head.kind))
        elif give is None:
            link.post(Head(REFUSE, plan, number))
        elif head.kind == ASK or not self._offer(link, head, give):
            self._reads.take_back(plan, number)
            weights = tuple(part.cpu() for part in give.weights)
            views = [bytes_of(part) for part in weights]
            num_bytes = sum(len(view) for view in views)
            link.post(Head(GIVE, plan, number, checksum(weights), num_bytes), views)

    def _offer(self, link: SideLink, head: Head, give: Give) -> bool:
        """Whether the weights can be read."""
        ticket = self._reads.ticket(give.weights)
        if ticket is None:
            return False
        found = checksum_in_place(give.weights)
        link.post(Head(OFFER, head.plan, head.number, found, len(ticket)), [memoryview(ticket)])
        return True

    def _done(self, link: SideLink, head: Head) -> None:
        self._reads.take_back(head.plan, head.number)
        if self._given_to(link, head) is not None:
            del self._gives[head.number]

    def _given_to(self, link: SideLink, head: Head) -> Give | None:
        """The transfer of the plan that this is about, as long as it has not gone."""
        give = self._gives.get(head.number) if head.plan == self._plan and not self._is_over else None
        return give if give is not None and give.to == link.index else None

    def _taken_from(self, link: SideLink, head: Head) -> Take | None:
        """The transfer of the plan that this is about, as long as it is wanted."""
        take = self._takes.get(head.number) if head.plan == self._plan else None
        if head.kind in (GIVE, OFFER) and self._reads.is_under_way(head.number):
            return None
        return take if take is not None and take.source == link.index else None

    def _place(self, link: SideLink, head: Head) -> Sequence[memoryview]:
        take = self._taken_from(link, head) if head.kind in (GIVE, OFFER) else None
        if take is None:
            return ()
        size = num_bytes_of(take.into) if head.kind == GIVE else min(head.num_bytes, MAX_TICKET_BYTES)
        if size != head.num_bytes:
            what = f"expert rank {link.index} sends {head.num_bytes} bytes instead of {size}"
            self._refuse(link, head, what)
            return ()
        if head.kind == OFFER:
            self._tickets[head.number] = bytearray(size)
            return [memoryview(self._tickets[head.number])]
        landing = tuple(part if part.is_cpu else torch.empty_like(part, device="cpu") for part in take.into)
        self._landing[head.number] = landing, time.monotonic()
        return [bytes_of(part) for part in landing]

    def _came(self, link: SideLink, head: Head) -> None:
        take = self._taken_from(link, head)
        if take is None:
            return
        landing, began_s = self._landing.pop(head.number)
        if self._is_right(link, head, checksum(landing)):
            for part, host in zip(take.into, landing, strict=True):
                if part is not host:
                    part.copy_(host)
            self._has_come(take, "tcp", time.monotonic() - began_s)

    def _offered(self, link: SideLink, head: Head) -> None:
        take = self._taken_from(link, head)
        if take is None:
            return
        try:
            self._reads.begin(head, take, bytes(self._tickets.pop(head.number)))
        except TransferError as error:
            self._refuse(link, head, f"expert rank {link.index} made {error}")

    def _was_read(self, read: Read) -> None:
        head, link = read.head, self._links[read.take.source]
        if read.error is not None:
            if self._reads.can_read_from(link.index):
                log.warning("weights of expert rank %d come by tcp from now on: %s", link.index, read.error)
            self._reads.avoid(link.index)
            link.post(Head(ASK, head.plan, head.number))
            return
        if self._is_right(link, head, checksum_in_place(read.take.into)):
            link.post(Head(DONE, head.plan, head.number))
            self._has_come(read.take, "nixl", read.reading.seconds)

    def _refuse(self, link: SideLink, head: Head, what: str) -> None:
        """What was sent, or may be read, will not do."""
        if head.kind == OFFER:
            link.post(Head(DONE, head.plan, head.number))
        self._fail(head.number, what, "checksum")

    def _is_right(self, link: SideLink, head: Head, found: int) -> bool:
        if found != head.checksum:
            what = f"has checksum {found}, not {head.checksum}"
            self._refuse(link, head, f"what came from expert rank {link.index} {what}")
        return found == head.checksum

    def _has_come(self, take: Take, transport: str, seconds: float) -> None:
        del self._takes[take.number]
        self.came[take.number] = Came(transport, num_bytes_of(take.into), seconds)

    def _fail(self, number: int, what: str, cause: str) -> None:
        take = self._takes.pop(number)
        self._landing.pop(number, None)
        self._tickets.pop(number, None)
        self._reads.give_up(number)
        self._links[take.source].scrap(self._plan, number)
        self._failed[number] = TransferError(what, cause)


def open_side_group(
    view: ViewInfo, links: Mapping[int, Stream], bytes_per_s: float, reads: WeightReads | None = None
) -> SideGroup:
    """The side group of a view's expert ranks, of which this rank is one; ``links`` by the peer's rank."""
    assert view.expert_index is not None, "only expert ranks hand weights to each other"
    index = {rank: i for i, rank in enumerate(view.expert_ranks)}
    return SideGroup({index[rank]: sock for rank, sock in links.items()}, bytes_per_s=bytes_per_s, reads=reads)
