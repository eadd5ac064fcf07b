"""The sequences that wait, and which of them is next.

The smaller priority first. Within a priority, sequences that had their turn already (preempted, or replayed because
their server was lost), then the tenants by turns, so that each gets the same share of tokens while it has work, whoever
asks more often. Within a tenant, the earlier arrival.

Turns are start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): one flow a tenant, equal weights; a request
costs its tokens, prompt and output at most.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from expertmesh.attention_server.request import Order, Sequence, SequenceState

_FLOWS_KEPT = 1024
_Heap = list[tuple[Order, Sequence]]


@dataclass(slots=True)
class _Class:
    """The sequences of one priority. Virtual time is in tokens: ``now`` is where the last one began, ``end`` up to
    where a tenant has been served."""

    again: _Heap = field(default_factory=list)
    tenants: dict[str, _Heap] = field(default_factory=dict)
    now: float = 0.0
    end: dict[str, float] = field(default_factory=dict)

    def start_of(self, tenant: str) -> float:
        return max(self.now, self.end.get(tenant, 0.0))


class WaitingQueue:
    """Sequences that end while they wait stay until they come up, and are skipped then."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}

    def push(self, sequence: Sequence) -> None:
        members = self._classes.setdefault(sequence.priority, _Class())
        had_turn = sequence.was_admitted or sequence.num_output > 0
        heap = members.again if had_turn else members.tenants.setdefault(sequence.tenant, [])
        heapq.heappush(heap, (sequence.order, sequence))

    def head(self) -> Sequence | None:
        """Who is next; None when nobody waits."""
        for priority in sorted(self._classes):
            heap = self._first(self._classes[priority])
            if heap is not None:
                return heap[0][1]
            if not self._classes[priority].end:
                del self._classes[priority]
        return None

    def pop(self) -> Sequence:
        """Take the head, which there must be."""
        sequence = self.head()
        assert sequence is not None, "nobody waits"
        members = self._classes[sequence.priority]
        heap = self._first(members)
        assert heap is not None, "the head is in it"
        heapq.heappop(heap)
        if heap is not members.again:
            members.now = members.start_of(sequence.tenant)
            members.end[sequence.tenant] = members.now + sequence.outstanding_tokens
            if len(members.end) > _FLOWS_KEPT:  # a tenant that is not ahead starts at `now` anyway
                members.end = {tenant: end for tenant, end in members.end.items() if end > members.now}
        return sequence

    def _first(self, members: _Class) -> _Heap | None:
        """The heap whose first sequence is next; empty ones are dropped."""
        if _skip_ended(members.again):
            return members.again
        waiting = [tenant for tenant, heap in members.tenants.items() if _skip_ended(heap)]
        if len(waiting) < len(members.tenants):
            members.tenants = {tenant: members.tenants[tenant] for tenant in waiting}
        if not waiting:
            return None
        tenant = min(waiting, key=lambda tenant: (members.start_of(tenant), members.tenants[tenant][0][0]))
        return members.tenants[tenant]


def _skip_ended(heap: _Heap) -> bool:
    """Whether a waiting sequence is left."""
    while heap and heap[0][1].state is not SequenceState.WAITING:
        heapq.heappop(heap)
    return bool(heap)
