"""How the planes of GPUs leave their peers: in which order, and within bounds. NCCL and DeepEP are stood in for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in torch's __all__

from expertmesh.mesh.config import DataPlaneConfig
from expertmesh.mesh.dataplane import deepep_open, factory, nccl_group
from expertmesh.mesh.dataplane.deepep import DeepEpPlane, DeepEpSettings
from expertmesh.mesh.dataplane.device_faults import DeviceWait
from expertmesh.mesh.dataplane.nccl import NcclPlane
from expertmesh.mesh.dataplane.nccl_group import NcclGroup
from expertmesh.mesh.errors import DataPlaneError, DeviceLostError
from support.plane_checks import Layout

CPU = torch.device("cpu")
NODES = ["n", "n"]
SETTINGS = DeepEpSettings(num_sms=None, fp8_dispatch=False, timeout_s=5.0)
SHAPE = Layout("ae", 4, 256, 2, max_num_tokens=64).shape(0)


@dataclass
class Group:
    """Writes down what is asked of it."""

    calls: list[str] = field(default_factory=list)
    all_leave: bool = True
    group: str = "the group"  # what DeepEP takes

    def leave(self) -> bool:
        self.calls.append("leave")
        return self.all_leave

    def abort(self) -> None:
        self.calls.append("abort")

    def destroy(self) -> None:
        """The buffer's, which is this object too: one list has the order of all calls."""
        self.calls.append("destroy")

    def exchange(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        raise RuntimeError("a peer has gone")


@dataclass
class Stubborn(Group):
    """Its connections go when the graphs have gone, or the test is over."""

    is_told: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def abort(self) -> None:
        self.is_told.set()
        self.may_end.wait(60.0)
        super().abort()


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubborn]:
    monkeypatch.setattr(nccl_group, "_ABORT_S", 0.05)
    group = Stubborn()
    yield group
    group.may_end.set()


# -- nccl -------------------------------------------------------------------------------------------------------------


def test_nccl_is_told_to_end_before_the_graphs_are_dropped_for_which_it_waits() -> None:
    group = Stubborn()
    plane = NcclPlane(group, SHAPE, CPU, timeout_s=1)
    plane.stop()
    assert group.is_told.wait(10.0)
    group.may_end.set()
    plane.close()
    plane.close()
    assert group.calls == ["leave", "abort"]


def test_a_process_whose_nccl_does_not_end_has_to_start_again(stubborn: Stubborn) -> None:
    plane = NcclPlane(stubborn, SHAPE, CPU, timeout_s=1)
    with pytest.raises(DeviceLostError, match="connections"):
        plane.close()


def test_nccl_that_fails_to_open_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group()
    with pytest.raises(DataPlaneError, match="a peer has gone"):
        open_over(monkeypatch, group)
    assert group.calls == ["abort"]


def test_nccl_that_fails_to_open_and_cannot_be_dropped_takes_the_process(
    monkeypatch: pytest.MonkeyPatch, stubborn: Stubborn
) -> None:
    with pytest.raises(DeviceLostError, match="connections"):
        open_over(monkeypatch, stubborn)


def open_over(monkeypatch: pytest.MonkeyPatch, group: Group) -> None:
    monkeypatch.setattr(factory, "connect_nccl", lambda *args: group)
    factory.open_on_device(DataPlaneConfig(backend="nccl"), HashStore(), SHAPE, CPU, NODES, join_s=30.0)


# -- deepep -----------------------------------------------------------------------------------------------------------


@dataclass
class Remembered:
    """DeepEP's memory of groups, which keeps their connections."""

    groups: dict[str, object]

    def open(self, monkeypatch: pytest.MonkeyPatch, group: Group, *, buffer: Callable[[], Group]) -> DeepEpPlane:
        monkeypatch.setattr(deepep_open, "connect_nccl", lambda *args: group)
        monkeypatch.setattr(deepep_open, "_buffer", lambda *args: buffer())
        return deepep_open.open_deepep(HashStore(), SHAPE, CPU, NODES, SETTINGS, 30.0, lambda: False)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Remembered:
    """A ``deep_ep`` that has only what remembers groups, and a device on which nothing runs."""
    memory: dict[str, object] = {"the group": object()}
    package, comm = ModuleType("deep_ep.utils"), SimpleNamespace(_storage=memory)
    package.comm = comm  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    monkeypatch.setitem(sys.modules, "deep_ep.utils", package)
    monkeypatch.setattr(deepep_open, "usable", lambda *args: None)
    monkeypatch.setattr(DeviceWait, "wait", lambda wait, event: None)
    monkeypatch.setattr(DeepEpPlane, "prepare", lambda plane, superseded: None)
    return Remembered(memory)


@pytest.mark.parametrize(("all_leave", "calls"), [(True, ["leave", "destroy", "abort"]), (False, ["leave", "abort"])])
def test_deepep_frees_its_buffer_when_all_leave_and_drops_its_connections_in_any_case(
    monkeypatch: pytest.MonkeyPatch, remembered: Remembered, all_leave: bool, calls: list[str]
) -> None:
    group = Group(all_leave=all_leave)
    plane = remembered.open(monkeypatch, group, buffer=lambda: group)
    plane.close()
    plane.close()
    assert group.calls == calls
    assert not remembered.groups


def test_a_process_whose_deepep_does_not_end_has_to_start_again(stubborn: Stubborn, remembered: Remembered) -> None:
    plane = DeepEpPlane(stubborn, cast(NcclGroup, stubborn), SHAPE, (1, 0), SETTINGS)
    with pytest.raises(DeviceLostError, match="connections"):
        plane.close()
    assert stubborn.calls == ["leave", "destroy"]


def test_deepep_whose_buffer_cannot_be_made_drops_its_connections(
    monkeypatch: pytest.MonkeyPatch, remembered: Remembered
) -> None:
    def fail() -> Group:
        raise RuntimeError("out of symmetric memory")

    group = Group()
    with pytest.raises(DataPlaneError, match="making DeepEP's buffer failed: out of symmetric memory"):
        remembered.open(monkeypatch, group, buffer=fail)
    assert group.calls == ["abort"]
    assert not remembered.groups


def test_deepep_whose_peer_does_not_compile_leaves_it(monkeypatch: pytest.MonkeyPatch, remembered: Remembered) -> None:
    def fail(plane: DeepEpPlane, superseded: Callable[[], bool]) -> None:
        raise DataPlaneError("not all ranks have compiled")

    monkeypatch.setattr(DeepEpPlane, "prepare", fail)
    group = Group(all_leave=False)
    with pytest.raises(DataPlaneError, match="not all ranks have compiled"):
        remembered.open(monkeypatch, group, buffer=lambda: group)
    assert group.calls == ["leave", "abort"]
