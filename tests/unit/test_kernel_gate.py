"""The gate kernel, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from expertmesh.kernels.gate import Gate, ReplicaPrices, SlotTables, route
from expertmesh.kernels.gate_reference import choose_replicas, settled_prices, spread
from expertmesh.kernels.gate_rule import SPREAD
from expertmesh.kernels.replica_costs import MEAN_PRICE_LIMIT
from expertmesh.mesh.placement import LayerRouting, Topology
from expertmesh.mesh.statistics import RoutingCounts
from support.gate_checks import check_route, replica_prices, routing_totals, slot_tables
from support.kernel_draws import Draw
from support.routing import topic_tokens

pytestmark = pytest.mark.slow

NODES = (0, 0, 1, 1)
SIGMOID = Gate(top_k=4, scoring="sigmoid", num_groups=6, top_groups=3, scale=2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("gate", [Gate(top_k=5), SIGMOID], ids=["softmax", "sigmoid"])
def test_equals_the_reference(gate: Gate, width: int, dtype: torch.dtype) -> None:
    tables = slot_tables(Draw(width, "cpu"), 24, width=width, slots_per_rank=18, node_R=NODES)
    check_route("cpu", gate, tables, 4 * 18, 7, dtype, has_bias=gate is SIGMOID, padding=2)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_number_of_choices(top_k: int) -> None:
    own = {"own_rank": 1, "own_node": 1} if top_k % 3 == 0 else {"own_node": top_k % 3 - 1}
    tables = slot_tables(Draw(top_k, "cpu"), 12, width=2, slots_per_rank=9, node_R=(0, 1, 1), **own)
    check_route("cpu", Gate(top_k=top_k, renormalizes=top_k % 2 == 0), tables, 27, 3, torch.float32)


@pytest.mark.parametrize("num_parts", [2, 5])
def test_logits_in_parts(num_parts: int) -> None:
    tables = slot_tables(Draw(1, "cpu"), 24, width=1, slots_per_rank=18, node_R=NODES)
    check_route("cpu", Gate(top_k=4), tables, 4 * 18, 5, torch.bfloat16, num_parts=num_parts, padding=1)


def test_ties_go_to_the_lowest_expert() -> None:
    tables = slot_tables(Draw(0, "cpu"), 12, width=1, slots_per_rank=4, node_R=(0, 0, 1))
    routing = route(torch.zeros(2, 12), Gate(top_k=3), tables)
    assert routing.expert_TK.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(routing.weight_TK, torch.full((2, 3), 1 / 3))


def test_counts_are_those_of_the_cpu_ranks() -> None:
    num_experts, slots_per_rank = 24, 12
    tables = slot_tables(Draw(3, "cpu"), num_experts, width=2, slots_per_rank=slots_per_rank, node_R=NODES)
    gate, totals = Gate(top_k=6), routing_totals(num_experts, 4 * slots_per_rank, "cpu")
    logits_TE = torch.randn(8, num_experts, generator=torch.Generator().manual_seed(3))
    result = route(logits_TE, gate, tables, prices=replica_prices(Draw(3, "cpu"), tables), totals=totals)
    topology = Topology(slots_per_rank=slots_per_rank, node_R=NODES)
    counts = RoutingCounts(1, [1], topology, num_experts=num_experts, top_k=gate.top_k)
    counts.add(result.expert_TK.numpy()[None], result.slot_TK.numpy()[None])
    counts.fold()
    assert (totals.pairs_EE.numpy() - 1 == counts.pairs_LEE[0]).all()
    assert (totals.slot_load_G.numpy() - 1 == counts.slot_load_LG[0]).all()
    assert (totals.visits - 1).tolist() == [counts.rank_visits_L[0], counts.node_visits_L[0]]


def test_a_step_that_is_run_again_chooses_the_same_until_it_is_committed() -> None:
    tables = slot_tables(Draw(5, "cpu"), 24, width=3, slots_per_rank=18, node_R=NODES)
    prices = ReplicaPrices.equal(4, "cpu")
    logits_TE = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    first = route(logits_TE, Gate(top_k=4), tables, prices=prices).slot_TK
    route(logits_TE.flip(0), Gate(top_k=4), tables, prices=prices)  # a step that was broken
    assert torch.equal(route(logits_TE, Gate(top_k=4), tables, prices=prices).slot_TK, first)
    prices.commit()
    assert prices.price_R.sum() > 0
    assert not torch.equal(route(logits_TE, Gate(top_k=4), tables, prices=prices).slot_TK, first)
    before = prices.price_R.clone()
    route(logits_TE[:0], Gate(top_k=4), tables, prices=prices)  # a step without tokens
    prices.commit()
    assert torch.equal(prices.price_R, before)


def test_prices_have_a_limit() -> None:
    prices = ReplicaPrices.equal(4, "cpu")
    for _ in range(500):
        prices.after_R.copy_(settled_prices(prices, torch.tensor([[0, 1]] * 30)))
        prices.commit()
    assert (prices.price_R >= 0).all()
    assert prices.price_R.mean() == pytest.approx(MEAN_PRICE_LIMIT, abs=0.01)


def placed(slots: list[int], num_experts: int, quota_R: list[float]) -> tuple[LayerRouting, SlotTables, ReplicaPrices]:
    """The same layer for the CPU's rule and for the device's, 4 ranks on 2 nodes, the source on the first."""
    topology = Topology(slots_per_rank=len(slots) // 4, node_R=NODES, own_node=0)
    routing, prices = LayerRouting(slots, num_experts, topology, quota_R=quota_R), ReplicaPrices.equal(4, "cpu")
    prices.share_R.copy_(torch.tensor(quota_R or [0.25] * 4, dtype=torch.float64))
    tables = SlotTables(
        replica_EW=torch.from_numpy(routing.slot_EW).int(),
        rank_EW=torch.from_numpy(routing.rank_EW).int(),
        node_R=torch.tensor(NODES, dtype=torch.int32),
        own_node=0,
    )
    return routing, tables, prices


def rows_of(expert_TK: torch.Tensor, step: int, tables: SlotTables, prices: ReplicaPrices) -> NDArray[np.int64]:
    """Rank of each choice, step by step, each one committed."""
    found = []
    for expert_SK in torch.split(expert_TK, step):
        rank_SK = tables.rank_EW[expert_SK, choose_replicas(expert_SK, tables, prices.price_R)].long()
        prices.after_R.copy_(settled_prices(prices, rank_SK))
        prices.commit()
        found.append(rank_SK.numpy())
    return np.concatenate(found)


def test_a_token_chooses_as_on_the_cpu_at_the_same_prices() -> None:
    """All but always: on the CPU a token's own rows raise the prices that its next ones find."""
    generator = np.random.default_rng(2)
    slots = [*generator.permutation(12), *generator.permutation(12)]
    routing, tables, _ = placed(slots, 12, [])
    expert_TK = torch.from_numpy(topic_tokens(12, 4, 300, seed=2).astype(np.int64))
    of_token_R = SPREAD * spread(torch.zeros(1, dtype=torch.int64), 4)[0].numpy()
    same = 0
    for one_TK in torch.split(expert_TK, 1):
        price_R = generator.integers(0, 60, 4) / 64
        routing.set_prices(price_R + of_token_R)
        which_TK = choose_replicas(one_TK, tables, torch.from_numpy(price_R))
        same += torch.equal(tables.replica_EW[one_TK, which_TK].long(), routing.choose(one_TK))
    assert same >= 0.95 * len(expert_TK)


@pytest.mark.parametrize(("step", "least"), [(8, 0.99), (64, 0.98), (512, 0.96)])
@pytest.mark.parametrize("quota_R", [[], [0.35, 0.3, 0.2, 0.15]], ids=["equal", "quota"])
def test_ranks_get_their_shares_whatever_the_size_of_a_step(step: int, least: float, quota_R: list[float]) -> None:
    generator = np.random.default_rng(1)
    slots = [*generator.permutation(32), *generator.permutation(32)]
    _, tables, prices = placed(slots, 32, quota_R)
    expert_TK = torch.from_numpy(topic_tokens(32, 4, 24_000, seed=1).astype(np.int64))
    rank_TK = rows_of(expert_TK, step, tables, prices)[8000:]
    share_R = np.bincount(rank_TK.ravel(), minlength=4) / rank_TK.size
    assert (share_R / prices.share_R.numpy()).max() <= 1 / least
