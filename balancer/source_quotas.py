"""Quotas of the sources: found for every new placement, and anew where traffic makes others worth a version.

Dimensions: S sources whose traffic is known, E experts of a layer, R expert ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import Floats, LayerStatistics, Layout, Proposal, Quotas
from expertmesh.balancer.solver.quotas import nearness, quota_shares, settled_rows
from expertmesh.v1 import mesh_pb2

Ints = NDArray[np.int32]

LEAST_ROWS = 1000.0
"""Of a source, decayed: before it has sent so many, its mix of experts is hardly known, and it matters little."""
MIN_GAIN = 0.02
"""Below it quotas alone are not worth a new version, though they load nothing; in the unit of ``Proposal.gain``."""


def with_quotas(
    proposal: Proposal, statistics: LayerStatistics, layout: Layout, current: Sequence[int], quotas: Quotas
) -> Proposal:
    """The proposal with the quotas that belong to its slots; where it is not worthwhile, other quotas for the slots in
    force if those are.

    Args:
        current, quotas: slots and quotas in force.
    """
    traffic = _Traffic.of(statistics, layout)
    if traffic is None:
        return proposal
    if proposal.worthwhile:
        return replace(proposal, quotas=traffic.quotas(proposal.slots))
    found = traffic.quotas(current)
    before, after = traffic.outcome(current, quotas), traffic.outcome(current, found)
    gain = 1 / before.balancedness - 1 / after.balancedness + before.away - after.away
    noise = traffic.noise(statistics.dispersion)
    if gain <= noise + MIN_GAIN:
        return proposal
    return replace(
        proposal,
        slots=tuple(current),
        before=replace(proposal.before, balancedness=before.balancedness),
        after=replace(proposal.before, balancedness=after.balancedness),
        gain=gain,
        noise=noise,
        worthwhile=True,
        num_loads=0,
        quotas=found,
    )


def quotas_of(placement: mesh_pb2.LayerPlacement) -> Quotas:
    """From their message."""
    return {quota.server_id: tuple(quota.rank_share) for quota in placement.source_quotas}


def quota_messages(quotas: Quotas) -> Iterable[mesh_pb2.SourceQuota]:
    """As their messages."""
    return [mesh_pb2.SourceQuota(server_id=server, rank_share=shares) for server, shares in quotas.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """``away``: the share of all rows that leave their source's node; of a source without one none do."""

    balancedness: float
    away: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Traffic:
    """What the sources of a view send; ``is_away_SR``: a rank is on another node than the source."""

    layout: Layout
    server_S: tuple[str, ...]
    load_SE: Floats
    near_SR: Floats
    is_away_SR: NDArray[np.bool_]

    @classmethod
    def of(cls, statistics: LayerStatistics, layout: Layout) -> _Traffic | None:
        """None while no source of the view has sent enough."""
        loads = statistics.sources
        known = tuple(server for server in layout.sources if server in loads and loads[server].sum() >= LEAST_ROWS)
        if not known:
            return None
        nodes = list(dict.fromkeys(layout.node_R))
        node_R = np.array([nodes.index(node) for node in layout.node_R])
        own_S = [nodes.index(layout.sources[server]) if layout.sources[server] in nodes else None for server in known]
        rank_S = [layout.server_R.index(server) if server in layout.server_R else None for server in known]
        return cls(
            layout=layout,
            server_S=known,
            load_SE=np.stack([loads[server] for server in known]),
            near_SR=np.stack([nearness(node_R, *own) for own in zip(own_S, rank_S, strict=True)]),
            is_away_SR=np.stack([np.full(len(node_R), own is not None) & (node_R != own) for own in own_S]),
        )

    def quotas(self, slots: Sequence[int]) -> Quotas:
        share_SR = quota_shares(self._table(slots), self.load_SE, self.near_SR)
        return {server: tuple(share_R.tolist()) for server, share_R in zip(self.server_S, share_SR, strict=True)}

    def outcome(self, slots: Sequence[int], quotas: Quotas) -> _Outcome:
        """Of sources that keep to these quotas as far as replicas let them."""
        table_RW, equal = self._table(slots), (1 / len(self.layout.node_R),) * len(self.layout.node_R)
        rows_SR = np.stack(
            [
                settled_rows(table_RW, load_E, np.array(quotas.get(server, equal)))
                for server, load_E in zip(self.server_S, self.load_SE, strict=True)
            ]
        )
        load_R = rows_SR.sum(axis=0)
        return _Outcome(
            balancedness=float(load_R.mean() / load_R.max()), away=float(rows_SR[self.is_away_SR].sum() / rows_SR.sum())
        )

    def noise(self, dispersion: float) -> float:
        """By how much counts of finite rows could make one set of quotas look better than another, as in ``judge``."""
        rows, num_ranks = self.load_SE.sum(), len(self.layout.node_R)
        return sqrt(2 * log(max(num_ranks, 2)) * dispersion) * (sqrt(num_ranks / rows) + 1 / sqrt(rows))

    def _table(self, slots: Sequence[int]) -> Ints:
        return np.array(slots, np.int32).reshape(len(self.layout.node_R), self.layout.width)
