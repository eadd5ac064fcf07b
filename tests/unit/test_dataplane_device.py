"""The data planes of GPUs, as far as a CPU can tell: the choice and its errors, numbers of slots, and nccl's sums."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in torch's __all__

from expertmesh.mesh.config import DataPlaneConfig, parse_config
from expertmesh.mesh.dataplane import Exchange
from expertmesh.mesh.dataplane import deepep_checks as checks
from expertmesh.mesh.dataplane.deepep import DeepEpPlane, DeepEpSettings, capacities, group_order, slot_ids
from expertmesh.mesh.dataplane.device_faults import DeviceWait, as_device_lost
from expertmesh.mesh.dataplane.factory import Backend, checked_backend, uses_links
from expertmesh.mesh.dataplane.nccl import NcclPlane
from expertmesh.mesh.dataplane.nccl_group import NcclGroup, agree, within
from expertmesh.mesh.errors import DataPlaneError, DeviceLostError, UserError
from support.plane_checks import Layout

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)

SHAPE = Layout("ae", 4, 256, 2, max_num_tokens=64).shape(0)


# -- which plane ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "deepep", "nccl", "tcp", "gloo"])
def test_every_backend_can_be_configured(backend: str) -> None:
    assert parse_config({"dataplane": {"backend": backend}}).dataplane.backend == backend


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("auto", CPU, "tcp"),
        ("gloo", CPU, "gloo"),
        ("auto", GPU, "auto"),
        ("deepep", GPU, "deepep"),
        ("nccl", GPU, "nccl"),
    ],
)
def test_a_backend_fits_its_device(backend: Backend, device: torch.device, expected: str) -> None:
    assert checked_backend(backend, device) == expected
    assert uses_links(DataPlaneConfig(backend=backend), device) == (expected == "tcp")


@pytest.mark.parametrize(
    ("backend", "device"), [("deepep", CPU), ("nccl", CPU), ("tcp", GPU), ("gloo", GPU)]
)  # fmt: skip
def test_a_backend_of_another_device_is_refused(backend: Backend, device: torch.device) -> None:
    with pytest.raises(UserError, match=r"dataplane.backend.*set it to auto"):
        checked_backend(backend, device)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dtype": torch.float32}, "model.dtype"),
        ({"hidden_size": 2880}, "hidden size that is a multiple of 256, not 2880"),
        ({"top_k": 33}, "up to 32 experts a token, not 33"),
        ({"slots_per_rank": 257}, "expert.slots_per_server: 257 slots"),
    ],
)
def test_sizes_that_deepep_has_no_kernels_for_are_named(change: dict[str, object], key: str) -> None:
    checks.check_shape(SHAPE)
    with pytest.raises(UserError, match=key):
        checks.check_shape(replace(SHAPE, **change))  # type: ignore[arg-type]  # one field of its own type


def test_deepep_that_is_not_installed_is_named_with_where_it_comes_from() -> None:
    with pytest.raises(UserError, match=r"no module deep_ep.*github.com/deepseek-ai/DeepEP.*nccl"):
        checks.check_installed()


def test_another_library_of_that_name_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deep_ep"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('nothing is imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="has no ElasticBuffer"):
        checks.check_installed()
    (package / "buffers").mkdir()
    (package / "buffers" / "elastic.py").touch()
    checks.check_installed()


def test_the_nccl_in_use_is_found_and_two_are_refused() -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 123 {}/libnccl.so.2\n"
    other = "7f02-7f03 r-xp 00000000 08:01 124 /usr/lib/libc.so.6\n"
    assert checks.loaded_nccl(line.format("/a b") * 2 + other) == Path("/a b/libnccl.so.2")
    with pytest.raises(UserError, match=r"2 NCCL libraries are loaded: /a/libnccl.so.2, /b/libnccl.so.2.*LD_PRELOAD"):
        checks.loaded_nccl(line.format("/a") + line.format("/b"))
    with pytest.raises(UserError, match="no NCCL library"):
        checks.loaded_nccl(other)


def test_an_old_nccl_is_named_with_its_version_and_the_remedy() -> None:
    checks.check_nccl(Path("/n/libnccl.so.2"), (2, 30, 4))
    with pytest.raises(UserError, match=r"/n/libnccl.so.2 is 2.28.9; pip install 'nvidia-nccl-cu13>=2.30.4'"):
        checks.check_nccl(Path("/n/libnccl.so.2"), (2, 28, 9))


def test_gpus_that_cannot_reach_each_other_are_named() -> None:
    checks.check_peers(1, 2, 2, [True, True])
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES: this rank sees 1 GPUs, and 2 ranks"):
        checks.check_peers(0, 1, 2, [True])
    with pytest.raises(UserError, match="GPU 1 has no peer access to GPU 0, 2"):
        checks.check_peers(1, 3, 2, [False, True, False])


# -- DeepEP's numbers -------------------------------------------------------------------------------------------------


def test_kernels_are_compiled_for_few_capacities() -> None:
    assert capacities(512) == (32, 256, 512)
    assert capacities(32) == (32,)
    assert capacities(7) == (7,)
    assert capacities(4096) == (32, 256, 2048, 4096)


@pytest.mark.parametrize(
    ("expert_ranks", "nodes", "order", "ids"),
    [
        ((0, 1), "nn", (0, 1), None),
        ((1,), "nn", (1, 0), None),  # experts first: what DeepEP counts is what we count
        ((1, 2), "nnn", (1, 2, 0), None),
        ((1, 3), "aabb", (1, 0, 3, 2), [0, 1, 4, 5, -1]),  # the ranks of a node stay together
        ((0, 2), "aba", (0, 2, 1), None),
    ],
)
def test_slots_become_ids_of_the_group(
    expert_ranks: tuple[int, ...], nodes: str, order: tuple[int, ...], ids: list[int] | None
) -> None:
    assert group_order(expert_ranks, list(nodes)) == order
    assert slot_ids(order, expert_ranks, slots_per_rank=2) == ids


def test_an_exchange_takes_the_least_capacity_with_kernels() -> None:
    settings = DeepEpSettings(num_sms=None, fp8_dispatch=False, timeout_s=5.0)
    plane = DeepEpPlane(None, cast(NcclGroup, None), replace(SHAPE, rank=1, max_num_tokens=100), (1, 0), settings)
    assert [plane._capacity(size) for size in (0, 1, 32, 33, 100, 112)] == [32, 32, 32, 100, 100, 100]
    assert [settings.sms_for(capacity) for capacity in (32, 256, 257)] == [24, 24, 64]


@pytest.mark.parametrize(
    ("timeout_s", "kernel_s", "host_s"), [(5.0, 3, 5.0), (4.9, 2, 4.9), (1.0, 1, 3.0), (0.1, 1, 3.0)]
)
def test_kernels_trap_before_the_host_gives_up(timeout_s: float, kernel_s: int, host_s: float) -> None:
    settings = DeepEpSettings(num_sms=None, fp8_dispatch=False, timeout_s=timeout_s)
    assert (settings.kernel_timeout_s, settings.host_timeout_s) == (kernel_s, host_s)


# -- agreeing ---------------------------------------------------------------------------------------------------------


def test_ranks_agree_when_all_have_come() -> None:
    store = HashStore()
    assert not agree(store, "ready", 0, 2, timeout_s=0.02)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda rank: agree(store, "ready", rank, 2, timeout_s=20.0), range(2)))


def test_ranks_stop_waiting_for_each_other_when_the_view_is_superseded() -> None:
    began = time.monotonic()
    assert not agree(HashStore(), "ready", 0, 2, timeout_s=30.0, is_over=lambda: True)
    assert time.monotonic() - began < 20.0


def test_a_rank_stops_connecting_when_the_view_is_superseded() -> None:
    never, over = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(within, 60.0, CPU, "connecting", never.wait, over.is_set)
        over.set()
        with pytest.raises(DataPlaneError, match=r"connecting was given up: a newer view is known"):
            connecting.result(20.0)
    never.set()
    assert within(5.0, CPU, "connecting", lambda: 7) == 7
    with pytest.raises(DataPlaneError, match=r"given up: 0.1 s are over"):
        within(0.1, CPU, "connecting", lambda: threading.Event().wait(1.0))


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_cuda_error_means_that_the_process_has_to_start_again() -> None:
    lost = as_device_lost(torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"))
    assert isinstance(lost, DeviceLostError)
    assert str(lost).endswith("CUDA error: unspecified launch failure")
    assert isinstance(as_device_lost(RuntimeError("CUDA driver exception (x.cu:1): 719")), DeviceLostError)
    assert as_device_lost(torch.OutOfMemoryError("CUDA out of memory")) is None
    assert as_device_lost(DataPlaneError("a rank was silent")) is None
    assert as_device_lost(ValueError("CUDA error")) is None


class Gradual:
    """Stands for an event of a GPU: done after so many looks."""

    def __init__(self, looks: int | None) -> None:
        self.looks = looks

    def query(self) -> bool:
        if self.looks is not None:
            self.looks -= 1
        return self.looks == 0


def wait_for(looks: int | None, wait: DeviceWait) -> None:
    wait.wait(Gradual(looks))  # type: ignore[arg-type]  # a GPU's event is only looked at


def test_the_device_is_waited_for_until_the_time_is_up() -> None:
    wait_for(3, DeviceWait(5.0, DataPlaneError))
    with pytest.raises(DataPlaneError, match=r"silent for 0.01 s"):
        wait_for(None, DeviceWait(0.01, DataPlaneError))


def test_a_wait_for_the_device_ends_when_the_view_is_over() -> None:
    wait = DeviceWait(30.0, DeviceLostError)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for, None, wait)
        wait.abandon()
        with pytest.raises(DeviceLostError, match="a newer view is out"):
            waiting.result(20)


# -- nccl, its exchanges carried by hand ------------------------------------------------------------------------------


@dataclass
class Post:
    """Carries what ranks exchange when it is waited for: by then all of them have handed it in."""

    rank: int
    letters: dict[tuple[int, int], deque[torch.Tensor]]

    def exchange(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Delivery:
        for peer, letter in enumerate(inputs):
            self.letters.setdefault((self.rank, peer), deque()).append(letter.clone())
        return Delivery(self, outputs)

    def leave(self) -> bool:
        return True

    def abort(self) -> None:
        self.letters.clear()


@dataclass
class Delivery:
    post: Post
    outputs: list[torch.Tensor]

    def wait(self) -> None:
        for peer, output in enumerate(self.outputs):
            letter = self.post.letters[peer, self.post.rank].popleft()
            assert letter.shape == output.shape, f"rank {peer} sent {letter.shape}, {output.shape} was expected"
            output.copy_(letter)


def distinct_slots(generator: torch.Generator, num_tokens: int, num_slots: int, top_k: int) -> torch.Tensor:
    """[T, K] slots, no token with the same twice; a fifth of the choices goes nowhere."""
    slot_TK = torch.rand(num_tokens, num_slots, generator=generator).argsort(1)[:, :top_k]
    return torch.where(torch.rand(num_tokens, top_k, generator=generator) < 0.2, -1, slot_TK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expert_ranks", "tokens"), [((0, 1), (5, 3)), ((1,), (4, 0)), ((1, 2), (3, 0, 2)), ((0, 1), (0, 0)), ((0,), (6,))]
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_nccl_sums_what_the_experts_say(expert_ranks: tuple[int, ...], tokens: Sequence[int], top_k: int) -> None:
    generator = torch.Generator().manual_seed(sum(tokens) + top_k)
    size, slots, hidden = len(tokens), 3, 8
    letters: dict[tuple[int, int], deque[torch.Tensor]] = {}
    shape = replace(SHAPE, size=size, expert_ranks=expert_ranks, slots_per_rank=slots, hidden_size=hidden, top_k=top_k)
    shapes = [replace(shape, rank=rank, dtype=torch.float32) for rank in range(size)]
    planes = [NcclPlane(Post(rank, letters), shapes[rank], CPU, timeout_s=1) for rank in range(size)]
    x = [torch.randn(count, hidden, generator=generator) for count in tokens]
    slot = [distinct_slots(generator, count, slots * len(expert_ranks), top_k) for count in tokens]
    weight = [torch.rand(count, top_k, generator=generator) for count in tokens]
    exchange = Exchange(layer=0, version=1, tokens=tokens, capacity=max(tokens))

    arriving = [plane.dispatch(x[r], slot[r], weight[r], exchange) for r, plane in enumerate(planes)]
    arrived = [pending.wait() for pending in arriving]
    returning = []
    for rank, plane in enumerate(planes):
        rows_NH, counts_S = arrived[rank].rows_NH, arrived[rank].counts_S
        y_NH = torch.full_like(rows_NH, float("nan"))  # rows of no slot
        if rank in expert_ranks:
            first = expert_ranks.index(rank) * slots
            slot_N = torch.arange(first, first + slots).repeat_interleave(counts_S)
            y_NH[: len(slot_N)] = expert(slot_N, rows_NH[: len(slot_N)])
            assert len(slot_N) == sum(int(((s >= first) & (s < first + slots)).sum()) for s in slot)
        else:
            assert not len(rows_NH)
        returning.append(plane.combine(y_NH, arrived[rank].handle))
    for rank, pending in enumerate(returning):
        y_TKH = expert(slot[rank], x[rank][:, None].expand(-1, top_k, -1))
        y_TKH = y_TKH * weight[rank][..., None] * (slot[rank] >= 0)[..., None]
        torch.testing.assert_close(pending.wait(), y_TKH.sum(1))


def expert(slot: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A distinct linear function per global slot."""
    return x * (slot + 1).unsqueeze(-1) + slot.unsqueeze(-1)
