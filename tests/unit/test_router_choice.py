"""Admission and the choice of an attention server."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router.admission import Admission
from expertmesh.router.errors import Refusal
from expertmesh.router.selection import Candidate, choose


def candidates(**outstanding: int) -> list[Candidate]:
    return [Candidate(server_id=name, outstanding_tokens=tokens) for name, tokens in outstanding.items()]


def pick(servers: list[Candidate], prompt: list[int], affinity_tokens: int = 4, slack_tokens: int = 100) -> str:
    chosen = choose(servers, prompt, affinity_tokens=affinity_tokens, slack_tokens=slack_tokens)
    assert chosen is not None
    return chosen.server_id


def test_nothing_to_choose_from() -> None:
    assert choose([], [1], affinity_tokens=4, slack_tokens=0) is None


def test_least_outstanding_without_affinity() -> None:
    assert pick(candidates(a=9, b=3, c=5), [1, 2, 3], affinity_tokens=0) == "b"


@given(prefix=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), rest=st.lists(st.integers(0, 9)))
def test_a_shared_prefix_goes_to_one_server(prefix: list[int], rest: list[int]) -> None:
    servers = candidates(a=0, b=50, c=100)
    assert pick(servers, prefix) == pick(servers, prefix + rest) == pick(servers[::-1], prefix + rest)


@given(prefix=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_a_server_that_leaves_moves_only_its_own_prefixes(prefix: list[int]) -> None:
    before = pick(candidates(a=0, b=0, c=0), prefix)
    after = pick(candidates(a=0, b=0), prefix)
    assert before in ("c", after)


def test_a_busy_server_loses_its_prefixes() -> None:
    preferred = pick(candidates(a=0, b=0), [1, 2, 3, 4])
    other = "b" if preferred == "a" else "a"
    assert pick(candidates(**{preferred: 100, other: 0}), [1, 2, 3, 4]) == preferred
    assert pick(candidates(**{preferred: 101, other: 0}), [1, 2, 3, 4]) == other


def test_prefixes_spread() -> None:
    chosen = [pick(candidates(a=0, b=0, c=0), [number]) for number in range(300)]
    assert all(chosen.count(name) > 60 for name in "abc")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def wait_for_a_place(admission: Admission, requests: int) -> None:
    """So many were sent to an attention server and have no token yet."""
    for number in range(requests):
        admission.admit(f"waits {number}", "")
        admission.may_shed(f"waits {number}", lambda refusal: None)


def test_admission_limits() -> None:
    clock = Clock()
    admission = Admission(max_requests=3, max_requests_per_tenant=2, clock=clock)
    admission.admit("r1", "alice")
    admission.admit("r2", "alice")
    with pytest.raises(Refusal, match="tenant 'alice' has 2 requests running") as refused:
        admission.admit("r3", "alice")
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(Refusal, match="'r2' is running") as refused:
        admission.admit("r2", "bob")
    assert refused.value.code is grpc.StatusCode.ALREADY_EXISTS
    admission.admit("r3", "bob")
    with pytest.raises(Refusal, match=r"router\.max_queued_requests") as refused:
        admission.admit("r4", "carol")
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.retry_after_ms is not None
    admission.release("r1")
    admission.admit("r1", "alice")
    assert len(admission) == 3


def test_retry_hint_follows_the_pace_of_requests_that_end() -> None:
    clock = Clock()
    admission = Admission(max_requests=2, max_requests_per_tenant=2, clock=clock, backlog=lambda: 1)
    wait_for_a_place(admission, 1)

    def hint_after(interval_s: float, times: int = 60) -> int:
        for _ in range(times):
            admission.admit("r", "")
            clock.now_s += interval_s
            admission.release("r")
        admission.admit("r", "")
        with pytest.raises(Refusal) as refused:
            admission.admit("s", "")
        admission.release("r")
        assert refused.value.retry_after_ms is not None
        return refused.value.retry_after_ms

    assert 180 <= hint_after(0.2) <= 220
    assert 2900 <= hint_after(3.0) <= 3100
    assert hint_after(0.01, 20_000) == 50
    assert hint_after(1000.0) == 10_000


def test_a_full_router_gives_a_waiting_place_to_what_is_worth_more() -> None:
    admission = Admission(max_requests=3, max_requests_per_tenant=3, clock=Clock())
    shed: dict[str, Refusal] = {}

    def admit(request_id: str, tenant: str, priority: int = 0) -> None:
        admission.admit(request_id, tenant, priority)
        admission.may_shed(request_id, lambda refusal: shed.update({request_id: refusal}))

    for request_id in ("a1", "a2", "a3"):
        admit(request_id, "alice")
    admission.may_shed("a3", None)  # its first token came
    with pytest.raises(Refusal):
        admit("low", "bob", 5)
    assert not shed
    admit("b1", "bob")  # in the place of the newest that waits, of the tenant that has more
    assert set(shed) == {"a2"}
    assert shed["a2"].code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert shed["a2"].retry_after_ms is not None
    assert "tenant with fewer than 'alice'" in str(shed["a2"])
    admission.release("a2")
    with pytest.raises(Refusal):
        admit("b2", "bob")  # alice has two, bob would have as many
    admit("urgent", "carol", -1)
    assert set(shed) == {"a2", "a1"}
    admission.release("a1")
    assert len(admission) == 3


def test_a_deadline_that_the_backlog_outlasts_is_refused_at_once() -> None:
    clock = Clock()
    backlog = [10]
    admission = Admission(max_requests=99, max_requests_per_tenant=99, clock=clock, backlog=lambda: backlog[0])
    wait_for_a_place(admission, 12)
    admission.admit("no pace known yet", "", timeout_s=0.1)
    for _ in range(60):
        admission.admit("r", "")
        clock.now_s += 0.5
        admission.release("r")
    with pytest.raises(Refusal, match=r"10 requests wait, about 5\.0 s, and the deadline is in 4\.0 s") as refused:
        admission.admit("r", "", timeout_s=4.0)
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    admission.admit("patient", "", timeout_s=6.0)
    admission.admit("endless", "")
    backlog[0] = 0
    admission.admit("r", "", timeout_s=0.1)


def test_requests_that_end_together_are_no_pace() -> None:
    """512 run at a time, end together after 4 s and ask again: whoever waits does so for about 4 s."""
    clock = Clock()
    admission = Admission(max_requests=4096, max_requests_per_tenant=4096, clock=clock, backlog=lambda: 500)
    wait_for_a_place(admission, 500)
    for number in range(512):
        admission.admit(f"{number}", "", timeout_s=6.0)
    for _ in range(20):
        clock.now_s += 4.0
        for number in range(512):
            admission.release(f"{number}")
            admission.admit(f"{number}", "", timeout_s=6.0)
    with pytest.raises(Refusal, match=r"500 requests wait, about [34]\.\d s, and the deadline is in 1\.0 s"):
        admission.admit("r", "", timeout_s=1.0)


def test_time_without_requests_is_no_pace() -> None:
    clock = Clock()
    admission = Admission(max_requests=99, max_requests_per_tenant=99, clock=clock, backlog=lambda: 10)
    for number in range(2):
        wait_for_a_place(admission, 10)
        for _ in range(60):
            admission.admit("r", "", timeout_s=6.0)
            clock.now_s += 0.5
            admission.release("r")
        for waiting in range(10):
            admission.release(f"waits {waiting}")
        clock.now_s += 3600.0 * (number + 1)


async def test_closed_admission_refuses_and_tells_when_it_is_empty() -> None:
    admission = Admission(max_requests=2, max_requests_per_tenant=2, clock=Clock())
    admission.admit("r1", "")
    admission.close("stopping")
    with pytest.raises(Refusal, match="stopping") as refused:
        admission.admit("r2", "")
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(TimeoutError):
        await admission.wait_empty(0.001)
    waiting = asyncio.create_task(admission.wait_empty(5))
    await asyncio.sleep(0)
    admission.release("r1")
    await waiting
