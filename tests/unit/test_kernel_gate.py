"""The gate kernel, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.gate import Gate, route
from expertmesh.mesh.placement import Topology
from expertmesh.mesh.statistics import RoutingCounts
from support.kernel_checks import Draw, check_route, routing_totals, slot_tables

pytestmark = pytest.mark.slow

NODES = (0, 0, 1, 1)
SIGMOID = Gate(top_k=4, scoring="sigmoid", num_groups=6, top_groups=3, scale=2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("gate", [Gate(top_k=5), SIGMOID], ids=["softmax", "sigmoid"])
def test_equals_the_reference(gate: Gate, width: int, dtype: torch.dtype) -> None:
    slots_per_rank = 24 * width // 4 + 1
    tables = slot_tables(Draw(width, "cpu"), 24, width=width, slots_per_rank=slots_per_rank, node_R=NODES)
    check_route("cpu", gate, tables, 4 * slots_per_rank, 7, dtype, has_bias=gate is SIGMOID, padding=2)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_number_of_choices(top_k: int) -> None:
    tables = slot_tables(Draw(top_k, "cpu"), 12, width=2, slots_per_rank=9, node_R=(0, 1, 1))
    check_route("cpu", Gate(top_k=top_k, renormalizes=top_k % 2 == 0), tables, 27, 3, torch.float32)


def test_ties_go_to_the_lowest_expert() -> None:
    tables = slot_tables(Draw(0, "cpu"), 12, width=1, slots_per_rank=4, node_R=(0, 0, 1))
    routing = route(torch.zeros(2, 12), Gate(top_k=3), tables, torch.zeros(1, dtype=torch.int64))
    assert routing.expert_TK.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(routing.weight_TK, torch.full((2, 3), 1 / 3))


def test_counts_are_those_of_the_cpu_ranks() -> None:
    num_experts, slots_per_rank = 24, 12
    tables = slot_tables(Draw(3, "cpu"), num_experts, width=2, slots_per_rank=slots_per_rank, node_R=NODES)
    gate, totals = Gate(top_k=6), routing_totals(num_experts, 4 * slots_per_rank, "cpu")
    logits_TE = torch.randn(8, num_experts, generator=torch.Generator().manual_seed(3))
    result = route(logits_TE, gate, tables, torch.zeros(1, dtype=torch.int64), totals=totals)
    topology = Topology(slots_per_rank=slots_per_rank, node_R=NODES)
    counts = RoutingCounts(1, [1], topology, num_experts=num_experts, top_k=gate.top_k)
    counts.add(result.expert_TK.numpy()[None], result.slot_TK.numpy()[None])
    counts.fold()
    assert (totals.pairs_EE.numpy() - 1 == counts.pairs_LEE[0]).all()
    assert (totals.slot_load_G.numpy() - 1 == counts.slot_load_LG[0]).all()
    assert (totals.visits - 1).tolist() == [counts.rank_visits_L[0], counts.node_visits_L[0]]
