"""Views: the immutable, numbered membership that a rank steps in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from expertmesh.v1 import mesh_pb2

HOSTS_EXPERTS = frozenset({mesh_pb2.ROLE_EXPERT, mesh_pb2.ROLE_BOTH})
HOSTS_ATTENTION = frozenset({mesh_pb2.ROLE_ATTENTION, mesh_pb2.ROLE_BOTH})


@dataclass(frozen=True)
class ViewInfo:
    """A view as one of its ranks sees it. ``rank`` is this process's own position."""

    proto: mesh_pb2.View
    rank: int

    @classmethod
    def for_server(cls, proto: mesh_pb2.View, server_id: str, incarnation: str) -> ViewInfo | None:
        """The view of this incarnation of a server, or None when it is not a member."""
        for rank in proto.ranks:
            if rank.server_id == server_id and rank.incarnation == incarnation:
                return cls(proto, rank.rank)
        return None

    @property
    def number(self) -> int:
        return self.proto.number

    @property
    def size(self) -> int:
        return len(self.proto.ranks)

    @property
    def slots_per_rank(self) -> int:
        return self.proto.slots_per_rank

    @cached_property
    def expert_ranks(self) -> tuple[int, ...]:
        """Ranks that host slots; a position in this tuple is an expert-rank index."""
        return tuple(rank.rank for rank in self.proto.ranks if rank.role in HOSTS_EXPERTS)

    @cached_property
    def expert_index(self) -> int | None:
        """This rank's position among the expert ranks, None when it hosts no slots."""
        return self.expert_ranks.index(self.rank) if self.rank in self.expert_ranks else None

    @cached_property
    def versions(self) -> dict[int, int]:
        """Layer → placement version."""
        return {placement.layer: placement.version for placement in self.proto.placement}

    def switched(self, placements: Iterable[mesh_pb2.LayerPlacement]) -> ViewInfo:
        """The view with some layers placed anew. It is another object: who reads the old one is not disturbed."""
        proto = mesh_pb2.View()
        proto.CopyFrom(self.proto)
        position = {placement.layer: i for i, placement in enumerate(proto.placement)}
        for placement in placements:
            proto.placement[position[placement.layer]].CopyFrom(placement)
        return ViewInfo(proto, self.rank)

    def local_slots(self) -> dict[int, list[int]]:
        """Layer → expert of each of this rank's slots (-1 = empty)."""
        assert self.expert_index is not None, "only an expert rank has slots"
        first = self.expert_index * self.slots_per_rank
        return {
            placement.layer: list(placement.slots[first : first + self.slots_per_rank])
            for placement in self.proto.placement
        }

    def server_ids(self, ranks: tuple[int, ...]) -> list[str]:
        return [self.proto.ranks[rank].server_id for rank in ranks]
