"""The one interface of the data plane, modelled on DeepEP V2's ElasticBuffer.

Dimensions: T tokens that this rank sends, K experts a token, H hidden size, S local slots, N rows that arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

R = TypeVar("R", covariant=True)
HandleT = TypeVar("HandleT")


class Pending(Protocol, Generic[R]):
    """An exchange under way: other work may be done until ``wait`` is called, once."""

    def wait(self) -> R:
        """Finish the exchange.

        Raises:
            DataPlaneError: a peer failed or was silent for longer than the time-out.
        """


@dataclass(frozen=True, slots=True)
class Exchange:
    """What all ranks know of one dispatch before it starts.

    ``tokens``: by rank, the tokens that it sends (T of that rank). ``version``: the placement version that the slots
    of ``layer`` were chosen under; an expert rank refuses another one.
    """

    layer: int
    version: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Dispatched(Generic[HandleT]):
    """What a rank has after a dispatch.

    ``rows_NH``: one row per (token, local slot), grouped by local slot; N = 0 on a rank without slots.
    ``counts_S``: int64, rows of each local slot. ``num_tokens``: distinct tokens among the rows. ``handle`` goes to
    ``combine``.
    """

    rows_NH: torch.Tensor
    counts_S: torch.Tensor
    num_tokens: int
    handle: HandleT


class DataPlane(Protocol[HandleT]):
    """The two all-to-alls of a MoE layer. All ranks of the view call both, in the same order."""

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> Pending[Dispatched[HandleT]]:
        """Send each token once to every rank that hosts one of its slots.

        Args:
            x_TH: the tokens; [0, H] on a rank without work.
            slot_TK: int64 global slots, -1 = nowhere.
            weight_TK: float32 factor of each choice in the combined sum.
        """

    def combine(self, y_NH: torch.Tensor, handle: HandleT) -> Pending[torch.Tensor]:
        """Return out[T, H] = Σ over K of weight × y of the chosen slot, in x's dtype.

        ``y_NH``: the expert outputs in the order of ``rows_NH``.
        """

    def close(self) -> None:
        """Drop the group; peers that still wait for this rank get an error."""
