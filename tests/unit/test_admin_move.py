"""``expertmesh balancer move``: which slots it changes, and what it refuses."""

from __future__ import annotations

import pytest

from expertmesh.cli.admin_move import slots_to_move
from expertmesh.mesh.errors import UserError

SERVERS = ["e0", "e0", "e1", "e1", "e2", "e2"]
SLOTS = [0, 1, 2, -1, 0, 3]


@pytest.mark.parametrize(
    ("expert", "to", "source", "expected"),
    [(1, "e1", None, (1, 3)), (3, "e1", None, (5, 3)), (0, "e1", "e0", (0, 3)), (0, "e1", "e2", (4, 3))],
)
def test_expert_leaves_its_slot_for_a_free_one(
    expert: int, to: str, source: str | None, expected: tuple[int, int]
) -> None:
    assert slots_to_move(SLOTS, SERVERS, expert, to, source) == expected


@pytest.mark.parametrize(
    ("expert", "to", "source", "message"),
    [
        (1, "e9", None, "SERVER: e9 holds no experts in this view; name one of e0, e1, e2"),
        (1, "e1", "e9", "--from: e9 holds no experts"),
        (7, "e1", None, "EXPERT: 7 is in no slot; name one from 0 to 3"),
        (2, "e1", None, "SERVER: e1 holds expert 2 already"),
        (0, "e1", None, "EXPERT: 0 has replicas on e0, e2; say which one moves: --from SERVER"),
        (1, "e1", "e2", "--from: e2 does not hold expert 1; name one of e0"),
        (1, "e2", None, "SERVER: e2 has no free slot in this layer"),
    ],
)
def test_refusals_name_the_argument_and_the_remedy(expert: int, to: str, source: str | None, message: str) -> None:
    with pytest.raises(UserError) as refused:
        slots_to_move(SLOTS, SERVERS, expert, to, source)
    assert message in str(refused.value)
