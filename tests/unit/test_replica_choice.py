"""Which replica a token goes to: always one of its expert's, near before far, never too many to one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.mesh import placement
from expertmesh.mesh.placement import Ints, LayerRouting, RoutingTables, Topology
from expertmesh.v1 import mesh_pb2

NUM_EXPERTS, TOP_K = 12, 4


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[int], Topology, list[float]]:
    """A placement of 12 experts with replicas and empty slots, its topology, its quotas or none."""
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
    quotas = [] if draw(st.booleans()) else generator.choice([0.0, 0.1, 1.0, 7.0], len(slots)).tolist()
    return slots.tolist(), topology, quotas


def tokens(seed: int, count: int, skew: float = 1.0) -> torch.Tensor:
    """int64 [count, K]: distinct experts, the first ones more often than the last."""
    generator = np.random.default_rng(seed)
    key_TE = generator.gumbel(size=(count, NUM_EXPERTS)) - skew * np.log(np.arange(1, NUM_EXPERTS + 1))
    return torch.from_numpy(np.argsort(-key_TE, axis=1)[:, :TOP_K].copy())


def ranks_visited(slot_TK: Ints, width: int) -> float:
    return float(np.mean([len(set(row)) for row in (slot_TK // width).tolist()]))


def caps(slots: list[int], quotas: list[float], expert_TK: Ints, slack: float) -> Ints:
    """Global slot → tokens that it may get."""
    quota = np.array(quotas or [1.0] * len(slots))
    found = np.zeros(len(slots))
    for slot, expert in enumerate(slots):
        if expert >= 0:
            home = [s for s, other in enumerate(slots) if other == expert]
            total = quota[home].sum()
            share = quota[slot] / total if total else 1 / len(home)
            found[slot] = np.ceil((expert_TK == expert).sum() * share * (1 + slack) - 1e-9)
            if share:
                found[slot] = max(found[slot], placement._LEAST_CAP)
    return found.astype(np.int64)


@given(
    placements(), st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(0, 2**63), st.sampled_from([0.0, 0.02])
)
def test_choices_hold_their_expert_within_the_cap(
    placed: tuple[list[int], Topology, list[float]], seed: int, count: int, turn: int, slack: float
) -> None:
    slots, topology, quotas = placed
    expert_TK = tokens(seed, count)
    routing = LayerRouting(slots, NUM_EXPERTS, topology, quotas=quotas, slack=slack)
    slot_TK = routing.choose(expert_TK, turn)
    assert slot_TK.dtype == torch.int64
    assert torch.equal(torch.tensor(slots)[slot_TK], expert_TK)
    load_G = np.bincount(slot_TK.numpy().ravel(), minlength=len(slots))
    assert (load_G <= caps(slots, quotas, expert_TK.numpy(), slack)).all()
    again = LayerRouting(slots, NUM_EXPERTS, topology, quotas=quotas, slack=slack).choose(expert_TK, turn)
    assert torch.equal(again, slot_TK)


@given(placements(), st.integers(0, 2**32 - 1))
def test_hardly_ever_more_ranks_than_with_turns(placed: tuple[list[int], Topology, list[float]], seed: int) -> None:
    """Turns alone bring all experts of a token to one rank where every rank has every expert; caps may cost that."""
    slots, topology, _ = placed
    chosen, turns = visits_chosen_and_by_turns(slots, topology, tokens(seed, 256).numpy())
    assert chosen <= turns + 0.15


def test_fewer_ranks_than_with_turns_on_average() -> None:
    generator = np.random.default_rng(0)
    topology = Topology(slots_per_rank=4, node_R=(0, 0, 1, 1))
    saved = []
    for seed in range(30):
        extra = generator.choice(NUM_EXPERTS, 4, replace=False)
        slots = generator.permutation([*range(NUM_EXPERTS), *extra]).tolist()
        chosen, turns = visits_chosen_and_by_turns(slots, topology, tokens(seed, 128).numpy())
        saved.append(turns - chosen)
    assert float(np.mean(saved)) > 0.1


def visits_chosen_and_by_turns(slots: list[int], topology: Topology, expert_TK: Ints) -> tuple[float, float]:
    """Ranks a token visits, and would visit if the replicas of each expert took turns over the tokens."""
    homes = [[slot for slot, held in enumerate(slots) if held == expert] for expert in range(NUM_EXPERTS)]
    turns_TK = np.array(
        [[homes[expert][turn % len(homes[expert])] for expert in row] for turn, row in enumerate(expert_TK.tolist())]
    )
    chosen_TK = LayerRouting(slots, NUM_EXPERTS, topology).choose(torch.from_numpy(expert_TK), 0).numpy()
    width = topology.slots_per_rank
    return ranks_visited(chosen_TK, width), ranks_visited(turns_TK, width)


def two_ranks(nodes: tuple[int, ...] = (0, 0), **of_source: int) -> Topology:
    return Topology(slots_per_rank=3, node_R=nodes, **of_source)


def test_a_rank_that_is_visited_anyway_comes_first() -> None:
    """Experts 0 and 1 have one home each, expert 2 has two."""
    routing = LayerRouting([0, 2, -1, 1, 2, -1], 3, two_ranks())
    for turn in range(20):
        assert routing.choose(torch.tensor([[0, 2], [2, 1]]), turn).tolist() == [[0, 1], [4, 3]]


def test_the_node_that_is_visited_anyway_comes_next() -> None:
    """Expert 0 is on rank 0 of node 0; expert 1 on rank 1 of the same node and on rank 2 of another."""
    topology = Topology(slots_per_rank=1, node_R=(0, 0, 1))
    routing = LayerRouting([0, 1, 1], 2, topology)
    for turn in range(20):
        assert routing.choose(torch.tensor([[0, 1]]), turn).tolist() == [[0, 1]]


def test_a_colocated_rank_and_its_node_cost_nothing() -> None:
    slots = [0, 1, 0, 1, 0, 1]
    for turn in range(20):
        own = Topology(slots_per_rank=2, node_R=(0, 0, 1), own_rank=1, own_node=0)
        assert LayerRouting(slots, 2, own).choose(torch.tensor([[0, 1]]), turn).tolist() == [[2, 3]]
        remote = Topology(slots_per_rank=2, node_R=(0, 0, 1), own_node=1)
        assert LayerRouting(slots, 2, remote).choose(torch.tensor([[0, 1]]), turn).tolist() == [[4, 5]]


def test_replicated_experts_meet_where_they_can() -> None:
    """Expert 0 is on ranks 0 and 1, expert 1 on ranks 1 and 2: both are on rank 1."""
    routing = LayerRouting([0, -1, 0, 1, 1, -1], 2, Topology(slots_per_rank=2, node_R=(0, 0, 0)))
    for turn in range(20):
        assert routing.choose(torch.tensor([[0, 1], [1, 0]]), turn).tolist() == [[2, 3], [3, 2]]


@pytest.mark.parametrize("batch", [1, 400])
def test_quotas_share_what_locality_leaves_open(batch: int) -> None:
    routing = LayerRouting([0, 0], 1, Topology(slots_per_rank=1, node_R=(0, 0)), quotas=[0.8, 0.2])
    expert_TK = torch.zeros(batch, 1, dtype=torch.int64)
    slot = torch.cat([routing.choose(expert_TK, turn).ravel() for turn in range(0, 4000, batch)])
    assert float((slot == 0).float().mean()) == pytest.approx(0.8, abs=0.03)


def test_sources_take_different_turns() -> None:
    expert_TK = torch.zeros(64, 1, dtype=torch.int64)
    made = [
        LayerRouting([0, 0], 1, Topology(slots_per_rank=1, node_R=(0, 0), source=source)).choose(expert_TK, 5)
        for source in (0, 1)
    ]
    assert not torch.equal(*made)


def test_a_layer_without_replicas_is_a_table() -> None:
    routing = LayerRouting([2, 0, -1, 1, -1, -1], 3, two_ranks())
    assert not routing.is_replicated
    assert routing.choose(torch.tensor([[0, 1], [2, 0]]), 3).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize(
    ("slots", "quotas", "words"),
    [
        ([0, 1], [], "experts .2. have no slot"),
        ([0, 1, 2, 3], [], "slot 3 holds expert 3"),
        ([0, 1, 2, -2], [], "slot 3 holds expert -2"),
        ([0, 1, 2, 2], [1.0], "quotas"),
        ([0, 1, 2, 2], [1.0, 1.0, -1.0, 2.0], "quotas"),
        ([0, 1, 2, 2], [1.0, 1.0, float("nan"), 2.0], "quotas"),
    ],
)
def test_a_wrong_placement_is_refused(slots: list[int], quotas: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LayerRouting(slots, 3, two_ranks(), quotas=quotas)


def test_tables_of_a_view_are_replaced_layer_by_layer() -> None:
    placed = [mesh_pb2.LayerPlacement(layer=layer, version=1, slots=[0, 1, -1, 2, -1, -1]) for layer in (1, 3)]
    tables = RoutingTables(placed, 3, two_ranks())
    tables.replace(mesh_pb2.LayerPlacement(layer=3, version=2, slots=[0, -1, -1, 2, 1, -1]))
    expert_TK = torch.tensor([[0, 1, 2]])
    assert tables[1].choose(expert_TK, 0).tolist() == [[0, 1, 3]]
    assert tables[3].choose(expert_TK, 0).tolist() == [[0, 4, 3]]
    with pytest.raises(ValueError, match=r"experts .1. have no slot"):
        tables.replace(mesh_pb2.LayerPlacement(layer=1, version=2, slots=[0, -1, -1, 2, -1, -1]))
    assert tables[1].choose(expert_TK, 0).tolist() == [[0, 1, 3]]
