"""What peers see of a rank whose device is lost: its links end while its process is still there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from expertmesh.mesh import stepthread, viewopening
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import DeviceLostError
from expertmesh.mesh.framing import Waker
from expertmesh.mesh.inbox import Inbox
from expertmesh.mesh.meet import Links, bind_listener, meet
from expertmesh.mesh.stepthread import StepThread
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.mesh.view import ViewInfo
from expertmesh.mesh.viewopening import RankParts
from expertmesh.v1 import mesh_pb2

TIMEOUT_S = 30.0
SPEC = SimpleNamespace(
    num_experts=4, moe_layers=(), hidden_size=8, top_k=2, dtype=torch.float32, name="model", family="family"
)


class Experts:
    def load(self, slots: dict[int, list[int]]) -> None:
        assert not slots


class LostPlane:
    """What runs on its device cannot be ended; whatever is asked of it after that fails the test."""

    is_on_device = True

    def stop(self) -> None:
        raise DeviceLostError("the device does not answer")


class LosingLoop:
    """Loses the device in its first step."""

    def __init__(self, *args: Any) -> None: ...

    def capture(self) -> None: ...

    def run(self) -> None:
        raise DeviceLostError("a kernel has trapped")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with bind_listener("127.0.0.1") as listener:
        yield listener


def test_a_rank_whose_device_is_lost_hangs_up_at_once(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(viewopening, "open_dataplane", lambda *args, **kwargs: LostPlane())
    monkeypatch.setattr(stepthread, "StepLoop", LosingLoop)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    proto = mesh_pb2.View(number=1, secret=b"secret", slots_per_rank=2)
    for rank in range(2):
        proto.ranks.add(
            rank=rank, server_id=f"s{rank}", incarnation="1", role=mesh_pb2.ROLE_EXPERT, rank_address=address
        )

    with ThreadPoolExecutor(2) as pool:
        meeting = pool.submit(join, proto, listener)
        reports: list[mesh_pb2.JoinRequest] = []
        lost = pool.submit(run_rank, proto, listener, reports)
        links = meeting.result(TIMEOUT_S)
        with closing(links):
            assert set(links.lockstep) == set(links.side) == {1}
            for sock in (links.lockstep[1].sock, links.side[1]):
                assert isinstance(sock, socket.socket)
                sock.settimeout(TIMEOUT_S)
                assert sock.recv(1) == b"", "this process, which is the rank's too, has not ended"
        with pytest.raises(DeviceLostError, match="does not answer"):
            lost.result(TIMEOUT_S)
    assert [report.WhichOneof("message") for report in reports] == ["view_ready", "view_broken"]
    assert reports[-1].view_broken.reason == "a kernel has trapped"


def join(proto: mesh_pb2.View, listener: socket.socket) -> Links:
    with closing(Waker()) as waker:
        view = ViewInfo(proto, 0)
        return meet(view, listener, waker, timeout_s=TIMEOUT_S, with_data=False, superseded=lambda: False)


def run_rank(proto: mesh_pb2.View, listener: socket.socket, reports: list[mesh_pb2.JoinRequest]) -> None:
    """Rank 1, until it fails."""
    with closing(Waker()) as waker:
        inbox = Inbox(waker)
        inbox.put_view(proto, "s1", "1")
        rank = RankParts(
            config=MeshConfig.model_validate({"dataplane": {"backend": "gloo"}}),
            spec=cast(Any, SPEC),
            attention=None,
            experts=cast(Any, Experts()),
            observer=None,
            telemetry=disabled_telemetry(),
            listener=listener,
            waker=waker,
            inbox=inbox,
            report=reports.append,
        )
        StepThread(rank, view_ended=lambda: None).run()
