"""From one table to the next: the transfers lead there, and their sources are valid, near and spread."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.balancer.policy import Layout
from expertmesh.balancer.transfers import plan_transfers


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[int], Layout]:
    num_ranks, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, num_ranks * width))
    slots = st.lists(st.integers(-1, num_experts - 1), min_size=num_ranks * width, max_size=num_ranks * width)
    layout = Layout(
        width=width,
        room_R=(width,) * num_ranks,
        node_R=tuple(draw(st.lists(st.sampled_from("mn"), min_size=num_ranks, max_size=num_ranks))),
        server_R=tuple(f"e{rank}" for rank in range(num_ranks)),
    )
    return draw(slots), draw(slots), layout


@given(tables())
def test_the_transfers_turn_the_old_table_into_the_new_one(case: tuple[list[int], list[int], Layout]) -> None:
    old, new, layout = case
    transfers = plan_transfers(old, new, layout)
    slots = [-1 if new[slot] < 0 else expert for slot, expert in enumerate(old)]
    for transfer in transfers:
        assert old[transfer.slot] != transfer.expert, "what is there already is not loaded"
        assert transfer.HasField("source_slot") == (transfer.expert in old)
        if transfer.HasField("source_slot"):
            assert old[transfer.source_slot] == transfer.expert
        slots[transfer.slot] = transfer.expert
    assert slots == new
    assert len({transfer.slot for transfer in transfers}) == len(transfers)


@given(tables())
def test_no_nearer_source_is_passed_over(case: tuple[list[int], list[int], Layout]) -> None:
    old, new, layout = case

    def distance(source: int, slot: int) -> int:
        sender, receiver = source // layout.width, slot // layout.width
        return 0 if sender == receiver else 1 + (layout.node_R[sender] != layout.node_R[receiver])

    for transfer in plan_transfers(old, new, layout):
        homes = [slot for slot, expert in enumerate(old) if expert == transfer.expert]
        if homes:
            assert distance(transfer.source_slot, transfer.slot) == min(distance(h, transfer.slot) for h in homes)


def test_replicas_take_turns_as_sources() -> None:
    layout = Layout(width=3, room_R=(3,) * 4, node_R=("n",) * 4, server_R=("a", "b", "c", "d"))
    old = [0, 1, -1, 0, 1, -1, -1, -1, -1, -1, -1, -1]
    new = [0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1]
    senders = Counter(transfer.source_slot // 3 for transfer in plan_transfers(old, new, layout))
    assert senders == {0: 2, 1: 2}
