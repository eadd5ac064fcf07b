"""The lockstep of a view, ranks as threads with real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from expertmesh.mesh.errors import DataPlaneError
from expertmesh.mesh.framing import Waker
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.meet import Links, bind_listener, meet
from expertmesh.mesh.steploop import tokens_of
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

Ready = mesh_pb2.StepReady


class Ranks:
    """``size`` ranks in one view, each with a thread of its own."""

    def __init__(self, size: int, *, timeout_s: float = 60.0, idle_tick_s: float = 30.0) -> None:
        self.size = size
        self.listener = bind_listener("127.0.0.1")
        self.wakers = [Waker() for _ in range(size)]
        self.pool = ThreadPoolExecutor(size)
        address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.view = mesh_pb2.View(number=7, secret=b"secret")
        for rank in range(size):
            self.view.ranks.add(rank=rank, rank_address=address)
        self.known_views = [7] * size
        self.links: list[Links] = []
        self.commits: list[list[int]] = [[] for _ in range(size)]
        self._times = {"timeout_s": timeout_s, "idle_tick_s": idle_tick_s}
        self.steps = list(self.pool.map(self.join, range(size)))

    def join(self, rank: int, secret: bytes = b"secret", join_timeout_s: float = 20.0) -> Lockstep:
        proto = mesh_pb2.View()
        proto.CopyFrom(self.view)
        proto.secret = secret
        view, waker = ViewInfo(proto, rank), self.wakers[rank]
        links = meet(view, self.listener, waker, timeout_s=join_timeout_s, with_data=False, superseded=lambda: False)
        self.links.append(links)
        return Lockstep(
            view, links.lockstep, waker, lambda: self.known_views[rank], lambda: self.commits[rank], **self._times
        )

    def drop(self, rank: int) -> None:
        """As a rank does when its view broke or its process ends."""
        self.steps[rank].close()
        for link in self.steps[rank]._links.values():
            link.close()

    def publish(self, rank: int, number: int) -> None:
        self.known_views[rank] = number
        self.wakers[rank].wake()

    def list_commit(self, rank: int, *ids: int) -> None:
        self.commits[rank] = [*self.commits[rank], *ids]
        self.wakers[rank].wake()

    def exchange(self, rank: int, num_tokens: int = 0, **brought: Any) -> Future[mesh_pb2.StepGo]:
        return self.pool.submit(self.steps[rank].exchange, lambda: Ready(num_tokens=num_tokens, **brought))

    def close(self) -> None:
        for links in self.links:
            links.close()
        for waker in self.wakers:
            waker.close()
        self.listener.close()
        self.pool.shutdown()


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def test_all_ranks_hear_the_tokens_of_all(three: Ranks) -> None:
    for step in range(3):
        waiting = [three.exchange(rank, num_tokens=10 * rank + step) for rank in range(3)]
        for future in waiting:
            go = future.result(timeout=20)
            assert (go.step, list(go.num_tokens), go.stop) == (step, [step, 10 + step, 20 + step], False)


def test_a_step_has_two_micro_batches_where_a_rank_brings_two(three: Ranks) -> None:
    """A rank that brings one has all its tokens in the first."""
    waiting = [
        three.exchange(0, 9, first_tokens=5, can_pad=True),
        three.exchange(1, 3, can_pad=True),
        three.exchange(2, 6, first_tokens=3, can_pad=True),
    ]
    goes = [future.result(5) for future in waiting]
    assert goes[0] == goes[1] == goes[2]
    assert tokens_of(goes[0]) == [[5, 3, 3], [4, 0, 3]]
    assert goes[0].padded_tokens == 8, "the size of each micro-batch"
    goes = [future.result(5) for future in [three.exchange(rank, 3, can_pad=True) for rank in range(3)]]
    assert tokens_of(goes[0]) == [[3, 3, 3]]
    assert goes[0].padded_tokens == 4


def test_a_step_with_prompts_is_padded_where_all_ranks_can(three: Ranks) -> None:
    """The others decode or have nothing to do."""
    waiting = [
        three.exchange(0, 9, can_pad=True, can_pad_chunks=True),
        three.exchange(1, 100, can_pad_chunks=True),
        three.exchange(2),
    ]
    go = waiting[1].result(20)
    assert all(future.result(20) == go for future in waiting)
    assert (go.padded_tokens, go.padded_chunks) == (128, True)
    goes = [future.result(20) for future in [three.exchange(rank, 9, can_pad=True) for rank in range(3)]]
    assert (goes[2].padded_tokens, goes[2].padded_chunks) == (16, False)
    goes = [future.result(20) for future in [three.exchange(rank, 9, can_pad_chunks=rank > 0) for rank in range(3)]]
    assert (goes[2].padded_tokens, goes[2].padded_chunks) == (0, False), "rank 0 cannot"


def test_idle_ranks_wait_until_one_has_work(three: Ranks) -> None:
    tokens = [0, 0, 0]
    asked = threading.Barrier(4)
    first = [True] * 3

    def ready(rank: int) -> Ready:
        if first[rank]:
            first[rank] = False
            asked.wait(20)
        return Ready(num_tokens=tokens[rank])

    waiting = [three.pool.submit(three.steps[rank].exchange, partial(ready, rank)) for rank in range(3)]
    asked.wait(20)
    assert not any(future.done() for future in waiting)
    tokens[2] = 4
    three.wakers[2].wake()
    for future in waiting:
        assert list(future.result(timeout=20).num_tokens) == [0, 0, 4]


def test_the_idle_tick_makes_an_empty_step() -> None:
    ranks = Ranks(2, idle_tick_s=0.01)
    try:
        for future in [ranks.exchange(rank) for rank in range(2)]:
            assert list(future.result(timeout=20).num_tokens) == [0, 0]
    finally:
        ranks.close()


def test_the_view_ends_only_when_every_rank_knows_the_next_one(three: Ranks) -> None:
    three.known_views = [7, 8, 8]
    waiting = [three.exchange(rank, num_tokens=1) for rank in range(3)]
    assert not any(future.result(timeout=20).stop for future in waiting)
    three.known_views[0] = 8
    waiting = [three.exchange(rank, num_tokens=1) for rank in range(3)]
    assert all(future.result(timeout=20).stop for future in waiting)


def test_an_idle_view_ends_as_soon_as_the_last_rank_hears_of_the_next_one(three: Ranks) -> None:
    waiting = [three.exchange(rank) for rank in range(3)]
    for rank in range(3):
        assert not any(future.done() for future in waiting)
        three.publish(rank, 8)
    assert all(future.result(timeout=20).stop for future in waiting)


def test_an_idle_mesh_commits_as_soon_as_the_last_rank_is_ready(three: Ranks) -> None:
    waiting = [three.exchange(rank) for rank in range(3)]
    for rank in (1, 0, 2):
        assert not any(future.done() for future in waiting)
        three.list_commit(rank, 5)
    for future in waiting:
        go = future.result(timeout=20)
        assert (list(go.num_tokens), list(go.commits)) == ([0, 0, 0], [5])


def test_ranks_commit_what_all_of_them_listed_in_order_of_ids(three: Ranks) -> None:
    three.commits = [[9, 5, 3], [3, 9, 7], [9, 3]]
    waiting = [three.exchange(rank, num_tokens=rank) for rank in range(3)]
    assert all(list(future.result(timeout=20).commits) == [3, 9] for future in waiting)


def test_a_rank_that_never_hears_holds_the_commit_and_not_the_steps(three: Ranks) -> None:
    three.commits = [[5], [5], []]
    for _ in range(3):
        waiting = [three.exchange(rank, num_tokens=1) for rank in range(3)]
        assert all(list(future.result(timeout=20).commits) == [] for future in waiting)
    three.commits = [[], [5], [5]]  # a rank that gave it up: a listing binds for its step only
    waiting = [three.exchange(rank, num_tokens=1) for rank in range(3)]
    assert all(list(future.result(timeout=20).commits) == [] for future in waiting)


def test_a_commit_that_is_heard_while_tokens_wait_comes_with_their_step(three: Ranks) -> None:
    waiting = [three.exchange(rank, num_tokens=1) for rank in (0, 1)]
    for rank in (0, 1):
        three.list_commit(rank, 5)
    three.commits[2] = [5]
    waiting.append(three.exchange(2))
    steps = [list(future.result(timeout=20).commits) for future in waiting]
    assert steps in ([[]] * 3, [[5]] * 3)  # whether the update was in time is a race, but it is one answer for all
    if steps[0] == []:
        waiting = [three.exchange(rank, num_tokens=1) for rank in range(3)]
        assert all(list(future.result(timeout=20).commits) == [5] for future in waiting)


def test_a_view_that_ends_commits_nothing(three: Ranks) -> None:
    three.known_views = [8, 8, 8]
    three.commits = [[5], [5], [5]]
    for future in [three.exchange(rank) for rank in range(3)]:
        go = future.result(timeout=20)
        assert (go.stop, list(go.commits)) == (True, [])


def test_a_hung_rank_that_the_next_view_drops_does_not_hold_the_others(three: Ranks) -> None:
    waiting = [three.exchange(rank, num_tokens=rank) for rank in (0, 1)]  # rank 2 is silent
    for rank in (0, 1):
        three.publish(rank, 8)
    with pytest.raises(DataPlaneError, match=r"ranks \[2\] were silent"):
        waiting[0].result(timeout=20)  # well before the time-out of 60 s
    three.drop(0)  # as the rank does when its view broke
    with pytest.raises(DataPlaneError):
        waiting[1].result(timeout=20)


def test_a_closed_link_breaks_the_step_of_the_others_at_once(three: Ranks) -> None:
    waiting = [three.exchange(rank) for rank in (0, 1)]
    three.drop(2)
    with pytest.raises(DataPlaneError) as caught:
        waiting[0].result(timeout=20)
    assert caught.value.suspects == (2,)
    three.drop(0)  # as the rank does when its view broke
    with pytest.raises(DataPlaneError):
        waiting[1].result(timeout=20)


def test_a_silent_rank_breaks_the_view_after_the_time_out() -> None:
    ranks = Ranks(2, timeout_s=0.05, idle_tick_s=0.01)
    try:
        with pytest.raises(DataPlaneError, match=r"ranks \[1\] were silent") as caught:
            ranks.exchange(0, num_tokens=1).result(timeout=20)
        assert caught.value.suspects == (1,)
    finally:
        ranks.close()


def test_strangers_and_zombies_are_not_let_in() -> None:
    ranks = Ranks(2)
    try:
        leader = ranks.pool.submit(ranks.join, 0)
        with socket.create_connection(ranks.listener.getsockname()[:2]) as stranger:
            stranger.sendall(b"\x05\x00\x00\x00GET /")
            stranger.settimeout(20)
            assert stranger.recv(1) == b""
        zombie = ranks.join(1, secret=b"of another view")
        with pytest.raises(DataPlaneError):
            zombie.exchange(lambda: Ready(num_tokens=1))
        member = ranks.join(1)
        waiting = [ranks.pool.submit(step.exchange, Ready) for step in (leader.result(timeout=20),)]
        ranks.publish(0, 8)
        ranks.publish(1, 8)
        assert member.exchange(Ready).stop
        assert waiting[0].result(timeout=20).stop
    finally:
        ranks.close()


def test_a_member_that_never_comes_is_named() -> None:
    ranks = Ranks(2)
    try:
        with pytest.raises(DataPlaneError) as caught:
            ranks.join(0, join_timeout_s=0.05)
        assert caught.value.suspects == (1,)
    finally:
        ranks.close()
