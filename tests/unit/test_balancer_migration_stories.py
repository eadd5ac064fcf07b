"""Any story of migrations, cuts, restarts and joins: a placement version means one table, and none comes back."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.door import Over
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.state import decode, encode
from support.balancer_parts import config, registration
from support.balancer_world import STEP_S, World

OPERATIONS = ["apply", "apply", "cut e1", "cut e2", "cut a1", "slow e1", "quick e1", "deaf e2", "hear e2", "break"]
OPERATIONS += ["restart", "join", "wait", "long wait", "mend", "mend"]


def do(w: World, operation: str, number: int) -> None:
    verb, _, server_id = operation.partition(" ")
    if verb == "apply" and w.phase is Phase.SERVING and not len(w.control.migrations):
        table = w.slots(0)
        first, second = number % len(table), (number // 8) % len(table)
        table[first], table[second] = table[second], table[first]
        with contextlib.suppress(RefusedError):  # two replicas on one server
            w.apply(0, table)
    elif verb == "cut" and w.servers[server_id].connected:
        w.disconnect(server_id)
    elif verb in ("slow", "quick"):
        w.hold(server_id, slow=verb == "slow")
    elif verb in ("deaf", "hear"):
        w.hold(server_id, deaf=verb == "deaf")
    elif verb == "break" and w.phase is Phase.SERVING:
        w.report_broken("a1")
    elif verb == "restart":
        w.restart_balancer(state=decode(encode(w.effects.saved[-1])))
    elif verb == "join":
        w.join(f"a{number + 10}")
    elif verb == "mend":
        mend(w)
    w.advance({"wait": 0.3, "long wait": 11.0}.get(operation, 0.02), step_s=0.25 if verb == "long" else STEP_S)


def mend(w: World) -> None:
    """Whoever is cut off comes back, under a new incarnation when it is fenced."""
    for server_id, server in list(w.servers.items()):
        if not server.connected and isinstance(w.rejoin(server_id), Over):
            w.connect(registration(server_id, incarnation=f"again-{w.now}"))
    w.advance(0.02)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 63)), max_size=14))
def test_versions_only_grow_and_stand_for_one_placement(story: list[tuple[str, int]]) -> None:
    """Within a view, whatever is lost: a version means one table, on every rank, and none comes back."""
    w = World(config(migration_timeout_s=10, lease_s=3))
    w.form("a1", "e1", "e2")
    tables: dict[tuple[int, int], list[int]] = {}
    highest = 0
    for operation, number in story:
        do(w, operation, number)
        for server in w.servers.values():
            for placement in server.running.placement:
                key = (server.running.number, placement.version)
                if placement.layer == 0:
                    assert tables.setdefault(key, list(placement.slots)) == list(placement.slots)
        assert w.versions()[0] >= highest or w.phase is Phase.ADOPTING
        highest = max(highest, w.versions()[0])
    for server_id in list(w.servers):
        w.hold(server_id, slow=False, deaf=False)
    for _ in range(4):
        mend(w)
        w.advance(4, step_s=0.1)
    w.advance(12, step_s=0.25)
    assert w.phase is Phase.SERVING
    assert w.agree()
    assert w.versions()[0] >= highest
