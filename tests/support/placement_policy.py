"""A placement policy of a few lines, and statistics that a test writes down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from expertmesh.balancer.policy import Floats, LayerStatistics, Layout, Prediction, Proposal


class FixedStatistics:
    """What every layer has counted; ``count`` adds tokens."""

    def __init__(self) -> None:
        self._load: dict[int, Floats] = {}
        self._tokens: dict[int, float] = {}
        self._sources: dict[int, dict[str, Floats]] = {}

    def count(self, layer: int, load_E: Sequence[float], tokens: float, *, sources: Mapping[str, float] = {}) -> None:
        """``tokens`` tokens that chose one expert each, in the proportions of ``load_E``; they replace those before.

        ``sources``: server id → its part of them.
        """
        share_E = np.array(load_E, dtype=float)
        self._load[layer] = tokens * share_E / share_E.sum()
        self._sources[layer] = {server: part * self._load[layer] for server, part in sources.items()}
        self._tokens[layer] = self._tokens.get(layer, 0.0) + tokens

    def tokens_seen(self, layer: int) -> float:
        return self._tokens.get(layer, 0.0)

    def layer_statistics(self, layer: int) -> LayerStatistics | None:
        if layer not in self._load:
            return None
        load_E = self._load[layer]
        sources = self._sources[layer]
        return LayerStatistics(tokens=float(load_E.sum()), load_E=load_E, coactivation_EE=None, sources=sources)

    def layer_load(self, layer: int) -> Floats | None:
        return self._load.get(layer)


class SwapPolicy:
    """Swaps the two experts that lower the fullest rank most, as long as that is so. No replicas.

    ``broken``: refuses every layer.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[float, ...]] = []
        self.broken = False

    def propose(
        self, statistics: LayerStatistics, layout: Layout, current: Sequence[int], max_loads: int | None
    ) -> Proposal:
        self.asked.append(tuple(statistics.load_E.tolist()))
        if self.broken:
            raise ValueError("broken by the test")
        load_E = statistics.load_E
        slots = list(current)
        while (max_loads is None or _changed(current, slots) + 2 <= max_loads) and (
            swap := _best_swap(slots, load_E, layout.width)
        ):
            a, b = swap
            slots[a], slots[b] = slots[b], slots[a]
        before, after = _balancedness(current, load_E, layout.width), _balancedness(slots, load_E, layout.width)
        gain, noise = 1 / before - 1 / after, 1 / math.sqrt(statistics.tokens)
        return Proposal(
            slots=tuple(slots),
            before=Prediction(balancedness=before, fanout_ranks=None, fanout_nodes=None),
            after=Prediction(balancedness=after, fanout_ranks=None, fanout_nodes=None),
            gain=gain,
            noise=noise,
            worthwhile=gain > noise + 0.01,
            num_loads=_changed(current, slots),
        )


def _changed(before: Sequence[int], after: Sequence[int]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))


def _rank_loads(slots: Sequence[int], load_E: Floats, width: int) -> Floats:
    load_S = np.array([load_E[expert] if expert >= 0 else 0.0 for expert in slots])
    load_R: Floats = load_S.reshape(-1, width).sum(axis=1)
    return load_R


def _balancedness(slots: Sequence[int], load_E: Floats, width: int) -> float:
    load_R = _rank_loads(slots, load_E, width)
    return float(load_R.mean() / load_R.max())


def _best_swap(slots: list[int], load_E: Floats, width: int) -> tuple[int, int] | None:
    load_R = _rank_loads(slots, load_E, width)
    best, found = load_R.max() - 1e-9, None
    full = int(load_R.argmax())
    for a in range(full * width, (full + 1) * width):
        for b, expert in enumerate(slots):
            if b // width == full or slots[a] < 0 or expert < 0:
                continue
            less = load_E[slots[a]] - load_E[expert]
            highest = max(load_R[full] - less, load_R[b // width] + less)
            if less > 0 and highest < best:
                best, found = highest, (a, b)
    return found
