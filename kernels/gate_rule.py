"""The rule by which replicas are chosen on a device, and the values that go in and come out of the gate.

The costs are those of the rule on the CPU (``host_replicas``): a token pays for the ranks and nodes that it visits and
for each row the price of its rank. There prices change token by token. Here all tokens of a launch find the prices that
were there at its beginning, and change them together. So that they do not all go to the rank that is cheapest at that
moment,

- each adds to every price a number of its own between 0 and ``SPREAD``, by its place in the step, and
- a row raises its rank's price by less in a step of many rows (``STEP_GAIN``).

Up to some 64 tokens a step it is as even as the rule on the CPU; in larger steps less so (docs/design.md).

Dimensions: E experts, K experts a token, W most replicas of an expert, R expert ranks, G global slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

SPREAD = 0.25
"""Without it steps of 512 tokens were 0.02 less level; twice of it cost 0.05 visits to nodes."""
STEP_GAIN = 0.25
"""By how much a rank's price rises in a step that sends it twice the mean, at most."""
SPREAD_KEYS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
TINY = 1e-20
"""DeepSeek-V3 divides by the sum of the chosen scores plus this."""

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a model's gate chooses; ``bias_E`` float32 and groups are sigmoid gates' alone."""

    top_k: int
    scoring: Scoring = "softmax"
    renormalizes: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class SlotTables:
    """One layer's placement on the device; tensors are replaced in place when the placement changes.

    ``replica_EW`` int32: global slots, and ``rank_EW`` int32: their expert ranks, different ones for an expert; -1
    behind the last one. ``node_R`` int32, from 0. Visits to ``own_rank`` and ``own_node`` cost nothing; -1 = none.
    """

    replica_EW: torch.Tensor
    rank_EW: torch.Tensor
    node_R: torch.Tensor
    own_rank: int = -1
    own_node: int = -1


@dataclass(frozen=True, kw_only=True)
class ReplicaPrices:
    """What rows of one layer cost on each rank, on the device.

    A launch reads ``price_R`` and writes ``after_R``, float64: a step that is run again finds the prices that it had.
    ``commit``, once a step is completed, takes the one over into the other. ``share_R`` float64: of the rows, that
    prices lead to. ``rows_R`` int64: zeros between launches.
    """

    price_R: torch.Tensor
    after_R: torch.Tensor
    share_R: torch.Tensor
    rows_R: torch.Tensor

    @classmethod
    def equal(cls, num_ranks: int, device: torch.device | str) -> ReplicaPrices:
        """Equal shares, prices of 0."""
        price_2R = torch.zeros(2, num_ranks, dtype=torch.float64, device=device)
        return cls(
            price_R=price_2R[0],
            after_R=price_2R[1],
            share_R=torch.full((num_ranks,), 1 / num_ranks, dtype=torch.float64, device=device),
            rows_R=torch.zeros(num_ranks, dtype=torch.int64, device=device),
        )

    def commit(self) -> None:
        """The step of the last launch is completed; enqueued, nothing waits."""
        self.price_R.copy_(self.after_R)


@dataclass(frozen=True, kw_only=True)
class RoutingTotals:
    """Counters of one layer that launches add to, int64, meanings as in ``mesh.statistics.RoutingCounts``.

    ``pairs_EE``; ``slot_load_G``; ``visits`` [2]: ranks, then nodes that tokens visited.
    """

    pairs_EE: torch.Tensor
    slot_load_G: torch.Tensor
    visits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """``weight_TK`` float32 rounded to the logits' dtype, ``expert_TK`` and ``slot_TK`` int64; best expert first."""

    weight_TK: torch.Tensor
    expert_TK: torch.Tensor
    slot_TK: torch.Tensor
