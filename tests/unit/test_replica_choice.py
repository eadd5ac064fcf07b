"""Which replica a token goes to: always one of its expert's, near before far, and ranks kept level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.kernels.replica_costs import MEAN_PRICE_LIMIT, NODE_COST, RANK_COST, ROW_PRICE
from expertmesh.mesh.placement import Ints, LayerRouting, RoutingTables, Topology
from expertmesh.v1 import mesh_pb2

NUM_EXPERTS, TOP_K = 12, 4


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[int], Topology, list[float]]:
    """A placement of 12 experts with replicas and empty slots, its topology, a quota or none."""
    num_ranks, num_nodes = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    width = draw(st.integers(-(-NUM_EXPERTS // num_ranks), NUM_EXPERTS))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = np.full(num_ranks * width, -1)
    order = generator.permutation(len(slots))
    slots[order[:NUM_EXPERTS]] = np.arange(NUM_EXPERTS)
    extra = draw(st.integers(0, len(slots) - NUM_EXPERTS))
    slots[order[NUM_EXPERTS : NUM_EXPERTS + extra]] = generator.integers(0, NUM_EXPERTS, extra)
    topology = Topology(
        slots_per_rank=width,
        node_R=tuple(generator.integers(0, num_nodes, num_ranks).tolist()),
        own_rank=draw(st.none() | st.integers(0, num_ranks - 1)),
        own_node=draw(st.none() | st.integers(0, num_nodes - 1)),
        source=draw(st.integers(0, 9)),
    )
    share_R = generator.choice([0.0, 0.1, 1.0, 7.0], num_ranks) + (np.arange(num_ranks) == 0)
    return slots.tolist(), topology, [] if draw(st.booleans()) else (share_R / share_R.sum()).tolist()


def tokens(seed: int, count: int, skew: float = 1.0) -> torch.Tensor:
    """int64 [count, K]: distinct experts, the first ones more often than the last."""
    generator = np.random.default_rng(seed)
    key_TE = generator.gumbel(size=(count, NUM_EXPERTS)) - skew * np.log(np.arange(1, NUM_EXPERTS + 1))
    return torch.from_numpy(np.argsort(-key_TE, axis=1)[:, :TOP_K].copy())


def ranks_visited(slot_TK: Ints, width: int) -> float:
    return float(np.mean([len(set(row)) for row in (slot_TK // width).tolist()]))


@given(placements(), st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_choices_hold_their_expert_and_repeat_until_they_are_committed(
    placed: tuple[list[int], Topology, list[float]], seed: int, count: int
) -> None:
    slots, topology, quota_R = placed
    expert_TK = tokens(seed, count)
    routing, other = (LayerRouting(slots, NUM_EXPERTS, topology, quota_R=quota_R) for _ in range(2))
    for _ in range(3):
        slot_TK = routing.choose(expert_TK)
        assert slot_TK.dtype == torch.int64
        assert torch.equal(torch.tensor(slots)[slot_TK], expert_TK)
        assert torch.equal(routing.choose(expert_TK), slot_TK), "a step that is repeated"
        assert torch.equal(other.choose(expert_TK), slot_TK), "another rank with the same past"
        routing.choose(expert_TK.flip(0))  # a step that was broken and came back with other tokens
        assert torch.equal(routing.choose(expert_TK), slot_TK)
        routing.commit()
        other.commit()


@given(placements(), st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_the_same_tokens_in_one_step_or_in_many(
    placed: tuple[list[int], Topology, list[float]], seed: int, step: int
) -> None:
    slots, topology, quota_R = placed
    expert_TK = tokens(seed, 200)
    whole = LayerRouting(slots, NUM_EXPERTS, topology, quota_R=quota_R).choose(expert_TK)
    routing = LayerRouting(slots, NUM_EXPERTS, topology, quota_R=quota_R)
    parts = []
    for start in range(0, 200, step):
        parts.append(routing.choose(expert_TK[start : start + step]))
        routing.commit()
    assert torch.equal(torch.cat(parts), whole)
    in_turns = LayerRouting(slots, NUM_EXPERTS, topology, quota_R=quota_R)
    in_turns.choose(expert_TK[:step].flip(0))  # a step that was broken between its micro-batches
    micro_batches = [in_turns.choose(expert_TK[:step]), in_turns.choose(expert_TK[step:], goes_on=True)]
    assert torch.equal(torch.cat(micro_batches), whole)
    in_turns.commit()
    assert in_turns.price_R.tolist() == routing.price_R.tolist()


@given(placements(), st.integers(0, 2**32 - 1), st.integers(1, 2000))
def test_prices_have_a_limit(placed: tuple[list[int], Topology, list[float]], seed: int, count: int) -> None:
    slots, topology, quota_R = placed
    routing = LayerRouting(slots, NUM_EXPERTS, topology, quota_R=quota_R)
    for _ in range(3):
        routing.choose(tokens(seed, count, skew=3.0))
        routing.commit()
        assert (routing.price_R >= 0).all()
        assert routing.price_R.mean() <= MEAN_PRICE_LIMIT + TOP_K * ROW_PRICE


@given(placements(), st.integers(0, 2**32 - 1))
def test_hardly_ever_more_ranks_than_with_turns(placed: tuple[list[int], Topology, list[float]], seed: int) -> None:
    """While no rank is ahead: prices cost visits where ranks cannot be level otherwise."""
    slots, topology, _ = placed
    expert_TK = tokens(seed, 64)
    routing = LayerRouting(slots, NUM_EXPERTS, replace(topology, own_rank=None, own_node=None))
    alone_TK = torch.cat([routing.choose(expert_TK[token : token + 1]) for token in range(64)]).numpy()
    width = topology.slots_per_rank
    assert ranks_visited(alone_TK, width) <= ranks_visited(by_turns(slots, expert_TK.numpy()), width) + 0.05


def test_fewer_ranks_than_with_turns_on_average() -> None:
    generator = np.random.default_rng(0)
    topology = Topology(slots_per_rank=4, node_R=(0, 0, 1, 1))
    saved = []
    for seed in range(30):
        extra = generator.choice(NUM_EXPERTS, 4, replace=False)
        slots = generator.permutation([*range(NUM_EXPERTS), *extra]).tolist()
        expert_TK = tokens(seed, 128)
        chosen_TK = LayerRouting(slots, NUM_EXPERTS, topology).choose(expert_TK).numpy()
        saved.append(ranks_visited(by_turns(slots, expert_TK.numpy()), 4) - ranks_visited(chosen_TK, 4))
    assert float(np.mean(saved)) > 0.1


def by_turns(slots: list[int], expert_TK: Ints) -> Ints:
    """Slots if the replicas of each expert took turns over the tokens."""
    homes = [[slot for slot, held in enumerate(slots) if held == expert] for expert in range(NUM_EXPERTS)]
    return np.array(
        [[homes[expert][turn % len(homes[expert])] for expert in row] for turn, row in enumerate(expert_TK.tolist())]
    )


def two_ranks() -> Topology:
    return Topology(slots_per_rank=3, node_R=(0, 0))


def test_a_rank_that_is_visited_anyway_comes_first() -> None:
    """Experts 0 and 1 have one home each, expert 2 has two."""
    routing = LayerRouting([0, 2, -1, 1, 2, -1], 3, two_ranks())
    for _ in range(20):
        assert routing.choose(torch.tensor([[0, 2], [2, 1]])).tolist() == [[0, 1], [4, 3]]
        routing.commit()


def test_the_node_that_is_visited_anyway_comes_next() -> None:
    """Expert 0 is on rank 0 of node 0; expert 1 on rank 1 of the same node and on rank 2 of another."""
    topology = Topology(slots_per_rank=1, node_R=(0, 0, 1))
    for source in range(2):
        routing = LayerRouting([0, 1, 1], 2, replace(topology, source=source))
        assert routing.choose(torch.tensor([[0, 1]])).tolist() == [[0, 1]]


def test_a_colocated_rank_and_its_node_cost_nothing() -> None:
    slots = [0, 1, 0, 1, 0, 1]
    own = Topology(slots_per_rank=2, node_R=(0, 0, 1), own_rank=1, own_node=0)
    assert LayerRouting(slots, 2, own).choose(torch.tensor([[0, 1]])).tolist() == [[2, 3]]
    remote = Topology(slots_per_rank=2, node_R=(0, 0, 1), own_node=1)
    assert LayerRouting(slots, 2, remote).choose(torch.tensor([[0, 1]])).tolist() == [[4, 5]]


def test_replicated_experts_meet_where_they_can() -> None:
    """Expert 0 is on ranks 0 and 1, expert 1 on ranks 1 and 2: both are on rank 1."""
    routing = LayerRouting([0, -1, 0, 1, 1, -1], 2, Topology(slots_per_rank=2, node_R=(0, 0, 0)))
    assert routing.choose(torch.tensor([[0, 1], [1, 0]])).tolist() == [[2, 3], [3, 2]]


@pytest.mark.parametrize("batch", [1, 8, 400])
def test_replicas_share_what_locality_leaves_open(batch: int) -> None:
    routing = LayerRouting([0, 0], 1, Topology(slots_per_rank=1, node_R=(0, 0)))
    assert slots_of_one_expert(routing, 4000, batch) == pytest.approx([2000, 2000], abs=1)


@pytest.mark.parametrize("batch", [1, 8, 400])
def test_a_rank_pays_for_locality_until_it_is_some_dozens_of_rows_ahead(batch: int) -> None:
    """Of two ranks the source's own costs nothing, so it gets more, but only by what outweighs a visit."""
    routing = LayerRouting([0, 0], 1, Topology(slots_per_rank=1, node_R=(0, 0), own_rank=0, own_node=0))
    own, other = slots_of_one_expert(routing, 4000, batch)
    assert own - other == pytest.approx(RANK_COST / ROW_PRICE * 2, abs=4)
    both = Topology(slots_per_rank=1, node_R=(0, 1), own_rank=0, own_node=0)
    own, other = slots_of_one_expert(LayerRouting([0, 0], 1, both), 4000, batch)
    assert own - other == pytest.approx((RANK_COST + NODE_COST) / ROW_PRICE * 2, abs=4)


def slots_of_one_expert(routing: LayerRouting, count: int, batch: int) -> list[int]:
    """Tokens of expert 0 at each of two slots."""
    load_G = np.zeros(2, np.int64)
    for _ in range(0, count, batch):
        load_G += np.bincount(routing.choose(torch.zeros(batch, 1, dtype=torch.int64)).numpy().ravel(), minlength=2)
        routing.commit()
    return [int(load) for load in load_G]


def test_ranks_are_level_within_a_few_steps_and_from_then_on() -> None:
    """Every expert is on two ranks, the first ones are asked for most: turns would load rank 0 twice as much."""
    slots = [0, 1, 2, 3, 4, 5, 0, 1, 6, 7, 8, 9, 2, 3, 6, 7, 10, 11, 4, 5, 8, 9, 10, 11]
    routing = LayerRouting(slots, NUM_EXPERTS, Topology(slots_per_rank=6, node_R=(0, 0, 1, 1)))
    loads = []
    for step in range(400):
        slot_TK = routing.choose(tokens(step, 8, skew=0.4)).numpy()
        routing.commit()
        loads.append(np.bincount(slot_TK.ravel() // 6, minlength=4))
    for window in np.array(loads[50:]).reshape(7, 50, 4).sum(axis=1):
        assert window.mean() / window.max() > 0.9


def test_sources_begin_with_different_replicas() -> None:
    made = [
        LayerRouting([0, 0], 1, Topology(slots_per_rank=1, node_R=(0, 0), source=source)).choose(torch.tensor([[0]]))
        for source in (0, 1)
    ]
    assert not torch.equal(*made)


def test_a_choice_of_no_expert_goes_nowhere() -> None:
    routing = LayerRouting([0, 1, 1], 2, Topology(slots_per_rank=1, node_R=(0, 0, 0)))
    assert routing.choose_replicas(np.array([[-1, 0], [-1, -1]])).tolist() == [[-1, 0], [-1, -1]]


def test_a_layer_without_replicas_is_a_table() -> None:
    routing = LayerRouting([2, 0, -1, 1, -1, -1], 3, two_ranks())
    assert not routing.is_replicated
    assert routing.choose(torch.tensor([[0, 1], [2, 0]])).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize(
    ("slots", "quota_R", "words"),
    [
        ([0, 1], [], "experts .2. have no slot"),
        ([0, 1, 2, 3], [], "slot 3 holds expert 3"),
        ([0, 1, 2, -2], [], "slot 3 holds expert -2"),
        ([0, 1, 2, 2], [1.0], "quota: 2 expert ranks"),
        ([0, 1, 2, 2], [2.0, -1.0], "quota"),
        ([0, 1, 2, 2], [1.0, float("nan")], "quota"),
        ([0, 1, 2, 2], [float("inf"), 0.0], "quota"),
        ([0, 1, 2, 2], [0.6, 0.6], "quota"),
    ],
)
def test_a_wrong_placement_is_refused(slots: list[int], quota_R: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LayerRouting(slots, 3, two_ranks(), quota_R=quota_R)


def test_tables_of_a_view_are_replaced_layer_by_layer() -> None:
    placed = [mesh_pb2.LayerPlacement(layer=layer, version=1, slots=[0, 1, -1, 2, -1, -1]) for layer in (1, 3)]
    tables = RoutingTables(placed, 3, two_ranks())
    tables.replace(mesh_pb2.LayerPlacement(layer=3, version=2, slots=[0, -1, -1, 2, 1, -1]))
    expert_TK = torch.tensor([[0, 1, 2]])
    assert tables[1].choose(expert_TK).tolist() == [[0, 1, 3]]
    assert tables[3].choose(expert_TK).tolist() == [[0, 4, 3]]
    with pytest.raises(ValueError, match=r"experts .1. have no slot"):
        tables.replace(mesh_pb2.LayerPlacement(layer=1, version=2, slots=[0, -1, -1, 2, -1, -1]))
    assert tables[1].choose(expert_TK).tolist() == [[0, 1, 3]]


def test_a_source_takes_its_own_quota_from_the_wire() -> None:
    placement = mesh_pb2.LayerPlacement(layer=1, version=1, slots=[0, 0])
    placement.source_quotas.add(server_id="a1", rank_share=[0.5, 0.5])
    placement.source_quotas.add(server_id="a2", rank_share=[0.1, 0.9])
    sent = mesh_pb2.LayerPlacement.FromString(placement.SerializeToString())
    for server, second in (("a1", 0.5), ("a2", 0.9), ("a3", 0.5)):
        tables = RoutingTables([sent], 1, Topology(slots_per_rank=1, node_R=(0, 0), server_id=server))
        assert mean_slot(tables) == pytest.approx(second, abs=0.02)
    placement.source_quotas[1].rank_share.append(0.0)
    placement.source_quotas[1].server_id = "a3"
    with pytest.raises(ValueError, match="quota: 2 expert ranks"):
        RoutingTables([placement], 1, Topology(slots_per_rank=1, node_R=(0, 0), server_id="a3"))


def mean_slot(tables: RoutingTables) -> float:
    """Over 4000 tokens of expert 0."""
    return float(tables[1].choose(torch.zeros(4000, 1, dtype=torch.int64)).double().mean())


def placed_on(servers: str, slots: list[int], earlier: RoutingTables | None = None) -> RoutingTables:
    """Tables of one layer, a slot on each of these servers."""
    topology = Topology(slots_per_rank=1, node_R=(0,) * len(servers), server_R=tuple(servers))
    return RoutingTables([mesh_pb2.LayerPlacement(layer=1, version=1, slots=slots)], 1, topology, earlier)


def test_prices_outlive_a_placement_and_a_view() -> None:
    tables = placed_on("abc", [0, 0, -1])
    tables[1].choose(torch.zeros(3, 1, dtype=torch.int64))
    tables.commit()
    before = dict(zip("abc", tables[1].price_R.tolist(), strict=True))
    assert len(set(before.values())) > 1
    tables[1].choose(torch.zeros(3, 1, dtype=torch.int64))  # of a step that is never completed
    tables.replace(mesh_pb2.LayerPlacement(layer=1, version=2, slots=[-1, 0, 0]))
    assert tables[1].price_R.tolist() == list(before.values())
    tables.commit()
    assert tables[1].price_R.tolist() == list(before.values())
    following = placed_on("cdb", [0, 0, 0], earlier=tables)
    assert following[1].price_R.tolist() == [before["c"], 0.0, before["b"]]


def test_a_step_that_a_broken_view_interrupted_chooses_the_same_in_the_next() -> None:
    expert_TK = torch.zeros(5, 1, dtype=torch.int64)
    tables = placed_on("ab", [0, 0])
    tables[1].choose(expert_TK)
    tables.commit()
    broken = tables[1].choose(expert_TK)
    assert torch.equal(placed_on("ab", [0, 0], earlier=tables)[1].choose(expert_TK), broken)
