"""What the online loop asks of statistics and of a placement policy. Pure values; the solver is behind an adapter.

Dimensions: E experts of a layer, R expert ranks, S global slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expertmesh.mesh.view import HOSTS_ATTENTION, HOSTS_EXPERTS
from expertmesh.v1 import mesh_pb2

Floats = NDArray[np.float64]
Quotas = Mapping[str, tuple[float, ...]]
"""Server id of a source → share of its rows for each expert rank; who is not in it shares them out equally."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """Routing counts of one layer, decayed; nobody changes the arrays any more.

    Args:
        tokens: decayed number of tokens behind the counts.
        load_E: times that each expert was chosen.
        coactivation_EE: tokens that chose both experts, diagonal 0; None = not counted.
        dispersion: variance over mean of the counts; 1 = independent tokens.
        sources: server id → its part of ``load_E``; of servers that are gone, too.
    """

    tokens: float
    load_E: Floats
    coactivation_EE: Floats | None
    dispersion: float = 1.0
    sources: Mapping[str, Floats] = field(default_factory=dict)


class StatisticsSource(Protocol):
    """The merged statistics of all attention halves."""

    def tokens_seen(self, layer: int) -> float:
        """Tokens counted in this layer, without decay: it only grows."""

    def layer_statistics(self, layer: int) -> LayerStatistics | None:
        """A snapshot; None while nothing was counted."""

    def layer_load(self, layer: int) -> Floats | None:
        """The ``load_E`` of that snapshot alone, which costs little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the slots of a view are: rank r has the global slots ``r * width`` to ``r * width + width - 1``, of which
    it can fill the first ``room_R[r]``. ``sources``: server id → node of its attention halves."""

    width: int
    room_R: tuple[int, ...]
    node_R: tuple[str, ...]
    server_R: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, view: mesh_pb2.View) -> Layout:
        hosts = [rank for rank in view.ranks if rank.role in HOSTS_EXPERTS]
        return cls(
            width=view.slots_per_rank,
            room_R=tuple(rank.num_slots for rank in hosts),
            node_R=tuple(rank.node for rank in hosts),
            server_R=tuple(rank.server_id for rank in hosts),
            sources={rank.server_id: rank.node for rank in view.ranks if rank.role in HOSTS_ATTENTION},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a placement does to the counted traffic; the fan-outs are None without co-activation."""

    balancedness: float
    fanout_ranks: float | None
    fanout_nodes: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A placement of one layer and what it is worth.

    Args:
        slots: global slot → expert, -1 = empty.
        quotas: that go with these slots.
        gain, noise: in the same unit: how much shorter a step of the layer gets, and how much of it is chance.
        worthwhile: the gain beats the noise and something changes.
        num_loads: slots whose weights have to be loaded; 0 where other quotas are all that changes.
    """

    slots: tuple[int, ...]
    before: Prediction
    after: Prediction
    gain: float
    noise: float
    worthwhile: bool
    num_loads: int
    quotas: Quotas = field(default_factory=dict)


class PlacementPolicy(Protocol):
    """Pure, and called on a worker thread: the same arguments give the same proposal."""

    def propose(
        self, statistics: LayerStatistics, layout: Layout, current: Sequence[int], max_loads: int | None
    ) -> Proposal:
        """A better placement than ``current`` for one layer.

        Args:
            current: global slot → expert in force. A filled slot is never emptied.
            max_loads: at most so many slots may be loaded; None = placed afresh. A policy that cannot improve a
                placement step by step does not keep it, and says so.

        Raises:
            ValueError: the statistics or the placement are not ones of this layer.
        """
