"""The data planes on two GPUs against a plain sum over experts: two processes, a GPU each.

DeepEP's kernels are compiled at first use, some seconds for each configuration (EP_JIT_CACHE_DIR keeps them).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from expertmesh.mesh.errors import EXIT_DEVICE_LOST
from support.gpu_backends import DEEPEP
from support.gpu_ranks import PlaneConfig, RankError, Ranks, close_planes, free_bytes, gpu_ranks
from support.plane_checks import Layout, check_exchanges, check_graph, check_overlap
from support.plane_faults import (
    announce_too_few,
    check_again,
    exchange_after_a_pause,
    exchange_for_ever,
    leave_with_status,
)

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BACKENDS = pytest.mark.parametrize("backend", [DEEPEP, "nccl"])
ROLES = pytest.mark.parametrize("roles", ["bb", "ae", "ea"])

SIZES = [(0, 1), (1, 0), (8, 8), (64, 1), (128, 512), (512, 0), (4096, 4096), (0, 4096), (8, 4096)]
SMALL = [(0, 1), (1, 0), (8, 8), (64, 1), (33, 64)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with gpu_ranks(2) as both:
        yield both


@pytest.fixture(autouse=True)
def _planes_are_closed(ranks: Ranks) -> Iterator[None]:
    yield
    ranks.run(close_planes)


def cases(sizes: list[tuple[int, int]]) -> list[tuple[tuple[int, int], str]]:
    return [(size, routing) for size in sizes for routing in ("any", "one", "none")]


@BACKENDS
@ROLES
@pytest.mark.parametrize(("hidden", "slots"), [(2048, 64), (7168, 128)])
def test_every_number_of_tokens(ranks: Ranks, backend: str, roles: str, hidden: int, slots: int) -> None:
    layout = Layout(roles, slots, hidden, 8)
    assert ranks.run(check_exchanges, PlaneConfig(backend), layout, cases(SIZES)) == [len(SIZES) * 3] * 2


@BACKENDS
@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_number_of_choices(ranks: Ranks, backend: str, top_k: int) -> None:
    layout = Layout("bb", 64, 2048, top_k, max_num_tokens=64)
    assert ranks.run(check_exchanges, PlaneConfig(backend), layout, cases(SMALL)) == [len(SMALL) * 3] * 2


@BACKENDS
@ROLES
@pytest.mark.parametrize("counts", [(8, 8), (128, 1), (4096, 4096)])
def test_a_graph_serves_other_tokens_and_other_routing(
    ranks: Ranks, backend: str, roles: str, counts: tuple[int, int]
) -> None:
    assert ranks.run(check_graph, PlaneConfig(backend), Layout(roles, 64, 2048, 8), counts) == [4, 4]


@BACKENDS
@ROLES
def test_two_exchanges_are_under_way_at_once(ranks: Ranks, backend: str, roles: str) -> None:
    ranks.run(check_overlap, PlaneConfig(backend), Layout(roles, 64, 2048, 8), (128, 64))


@pytest.mark.parametrize("backend", [DEEPEP])
@ROLES
@pytest.mark.parametrize(("hidden", "slots"), [(2048, 64), (7168, 128)])
def test_tokens_sent_as_float8_come_back_within_its_noise(
    ranks: Ranks, backend: str, roles: str, hidden: int, slots: int
) -> None:
    config = PlaneConfig(backend, fp8_dispatch=True)
    assert ranks.run(check_exchanges, config, Layout(roles, slots, hidden, 8), cases(SIZES)) == [len(SIZES) * 3] * 2


@BACKENDS
def test_a_view_follows_another_and_memory_is_given_back(ranks: Ranks, backend: str) -> None:
    layout = Layout("bb", 64, 2048, 8)
    config = PlaneConfig(backend)
    free = []
    for turn in range(3):
        assert ranks.run(check_exchanges, config, layout, [((8, 64), "any")]) == [1, 1], turn
        ranks.run(close_planes)
        free.append(ranks.run(free_bytes))
    for first, last in zip(free[0], free[-1], strict=True):
        assert last >= first - 64 * 2**20, f"{(first - last) >> 20} MiB are gone after two more views"


# -- a rank is killed, or late ----------------------------------------------------------------------------------------


@BACKENDS
def test_a_killed_rank_is_noticed_in_time_and_its_successor_takes_part(backend: str) -> None:
    """The time-out is 4 s. A survivor of nccl goes on as it is; one of deepep has lost its context and starts again."""
    config = PlaneConfig(backend, timeout_s=4.0)
    with gpu_ranks(2) as ranks:
        for rank in range(2):
            ranks.send(rank, exchange_for_ever, config)
        ranks.server.wait([f"under-way/{rank}" for rank in range(2)])
        killed_at = time.monotonic()
        ranks.kill(1)
        found = ranks.answer(0, timeout_s=30)
        passed_s = {"noticed": found["at"] - killed_at}
        assert passed_s["noticed"] <= 5.0, found
        assert found["error"] == ("DeviceLostError" if backend == "deepep" else "DataPlaneError"), found
        if backend == "deepep":
            ranks.send(0, leave_with_status)
            assert ranks.exit_status(0, 30) == EXIT_DEVICE_LOST
            passed_s["exited"] = time.monotonic() - killed_at
            ranks.restart(0)
        ranks.restart(1)
        ranks.run(free_bytes)
        passed_s["started again"] = time.monotonic() - killed_at
        assert ranks.run(check_again, config) == [3, 3]
        passed_s["exchanged again"] = time.monotonic() - killed_at
        print(backend, {name: round(seconds, 2) for name, seconds in passed_s.items()}, found["message"])


@BACKENDS
def test_a_rank_killed_between_two_steps_leaves_the_other_unhurt(backend: str) -> None:
    """Nothing of the survivor is on the device: it drops its buffer and goes on in the same process."""
    with gpu_ranks(2) as ranks:
        config = PlaneConfig(backend)
        assert ranks.run(check_again, config) == [3, 3]
        ranks.kill(1)
        ranks.send(0, close_planes)
        ranks.answer(0, timeout_s=30)
        ranks.restart(1)
        assert ranks.run(check_again, config) == [3, 3]


@BACKENDS
def test_a_slow_rank_is_waited_for(ranks: Ranks, backend: str) -> None:
    """Silence within the time-out is no failure."""
    ranks.run(exchange_after_a_pause, PlaneConfig(backend))


def test_tokens_that_were_not_announced_are_an_assertion(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="announces other tokens"):
        ranks.run(announce_too_few)
