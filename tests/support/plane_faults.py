"""What ranks do while one of them is killed or late, run by ``gpu_ranks``."""

from __future__ import annotations

import os
import time

from expertmesh.mesh.dataplane.base import Exchange
from expertmesh.mesh.errors import EXIT_DEVICE_LOST, DataPlaneError, DeviceLostError
from support.gpu_ranks import PlaneConfig, Rank, plane_of
from support.plane_checks import Layout, check_exchanges, draw, round_trip

LAYOUT = Layout("bb", 64, 2048, 8, max_num_tokens=64)

_AT_A_TIME = 20  # exchanges between two looks at the device: a step has one for each layer
_UNDER_WAY = 2000


def exchange_for_ever(rank: Rank, config: PlaneConfig) -> dict[str, object]:
    """Round trips until the plane fails; what it failed with, and when on the machine's clock."""
    plane = plane_of(rank, config, LAYOUT.shape(rank.rank))
    batch = draw(LAYOUT, 64, rank.rank, rank.device, "any")
    done = 0
    while True:
        try:
            for _ in range(_AT_A_TIME):
                round_trip(plane, LAYOUT, rank.rank, batch, [64, 64])
            plane.check()
        except DataPlaneError as error:
            found = {"error": type(error).__name__, "message": str(error), "done": done, "at": time.monotonic()}
            if not isinstance(error, DeviceLostError):
                rank.keep.clear()
                plane.close()
            return found
        done += _AT_A_TIME
        if done == _UNDER_WAY:
            rank.store.set(f"under-way/{rank.rank}", "")


def leave_with_status(rank: Rank) -> None:
    """What ``expertmesh serve`` does with a ``DeviceLostError``."""
    os._exit(EXIT_DEVICE_LOST)


def check_again(rank: Rank, config: PlaneConfig) -> int:
    return check_exchanges(rank, config, LAYOUT, [((8, 64), "any"), ((64, 0), "one"), ((1, 1), "none")])


def exchange_after_a_pause(rank: Rank, config: PlaneConfig) -> None:
    plane = plane_of(rank, config, LAYOUT.shape(rank.rank))
    if rank.rank == 1:
        time.sleep(1.0)
    round_trip(plane, LAYOUT, rank.rank, draw(LAYOUT, 64, rank.rank, rank.device, "any"), [64, 64])
    plane.check()


def announce_too_few(rank: Rank) -> None:
    plane = plane_of(rank, PlaneConfig("nccl"), LAYOUT.shape(rank.rank))
    batch = draw(LAYOUT, 8, rank.rank, rank.device, "any")
    plane.dispatch(batch.x_TH, batch.slot_TK, batch.weight_TK, Exchange(0, 1, [7, 7], 8))
