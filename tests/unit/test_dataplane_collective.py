"""The data plane over gloo and over the ranks' own links against a plain sum over experts, ranks as threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh.mesh.dataplane import Exchange
from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.collective import CollectivePlane
from expertmesh.mesh.errors import DataPlaneError
from support.groups import GROUPS, socket_group

LAYER, VERSION = 3, (1 << 33) + 5


@dataclass(frozen=True)
class Layout:
    """Roles by rank ('a', 'e' or 'b'), tokens by rank, slots a rank."""

    roles: str
    tokens: tuple[int, ...]
    slots: int

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, role in enumerate(self.roles) if role in "eb")

    def shape(self, rank: int, hidden: int, top_k: int, dtype: torch.dtype) -> PlaneShape:
        return PlaneShape(
            rank=rank,
            size=len(self.roles),
            expert_ranks=self.expert_ranks,
            slots_per_rank=self.slots,
            hidden_size=hidden,
            top_k=top_k,
            dtype=dtype,
            max_num_tokens=64,
        )


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    roles = draw(st.sampled_from(["b", "ae", "bb", "aee", "aaee", "abe", "aab"]))
    tokens = tuple(draw(st.integers(0, 9)) if role in "ab" else 0 for role in roles)
    return Layout(roles, tokens, draw(st.integers(1, 5)))


def expert(slot: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A distinct linear function per global slot."""
    return x * (slot + 1).unsqueeze(-1) + slot.unsqueeze(-1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    layouts(), st.integers(1, 4), st.sampled_from([6, 7, 16]), st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31), st.sampled_from(sorted(GROUPS)),
)  # fmt: skip
@pytest.mark.slow
def test_combine_equals_the_plain_sum(
    layout: Layout, top_k: int, hidden: int, dtype: torch.dtype, seed: int, backend: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_slots = layout.slots * len(layout.expert_ranks)
    inputs = []
    for count in layout.tokens:
        x = torch.randn(count, hidden, generator=generator).to(dtype)
        slots = torch.randint(-1, num_slots, (count, top_k), generator=generator)
        inputs.append((x, slots, torch.rand(count, top_k, generator=generator)))
    exchange = Exchange(layer=LAYER, version=VERSION, tokens=layout.tokens)

    def run(rank: int) -> torch.Tensor:
        plane = planes[rank]
        outs = []
        for _ in range(2):  # twice: the second exchange reuses the buffers of the first
            dispatched = plane.dispatch(*inputs[rank], exchange).wait()
            y = dispatched.rows_NH
            if rank in layout.expert_ranks:
                first = layout.expert_ranks.index(rank) * layout.slots
                slot = torch.repeat_interleave(torch.arange(layout.slots), dispatched.counts_S) + first
                assert slot.shape[0] == y.shape[0]
                y = expert(slot, y.float()).to(dtype)
            outs.append(plane.combine(y, dispatched.handle).wait())
        assert torch.equal(outs[0], outs[1])
        return outs[0]

    with GROUPS[backend](len(layout.roles)) as groups:
        planes = [
            CollectivePlane(group, layout.shape(rank, hidden, top_k, dtype), timeout_s=20)
            for rank, group in enumerate(groups)
        ]
        with ThreadPoolExecutor(len(groups)) as pool:
            outs = list(pool.map(run, range(len(groups))))
    for (x, slots, weights), out in zip(inputs, outs, strict=True):
        y = expert(slots.clamp(min=0), x.float().unsqueeze(1).expand(-1, top_k, -1)).to(dtype).float()
        want = (y * (weights * (slots >= 0)).unsqueeze(-1)).sum(1)
        assert out.dtype == dtype
        assert out.shape == x.shape
        rtol, atol = (2e-2, 2e-1) if dtype == torch.bfloat16 else (1e-5, 1e-4)
        torch.testing.assert_close(out.float(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", sorted(GROUPS))
def test_a_token_goes_once_to_a_rank_with_several_of_its_experts(backend: str) -> None:
    layout = Layout("ae", (3, 0), slots=4)
    exchange = Exchange(layer=0, version=1, tokens=layout.tokens)
    slots = torch.tensor([[0, 1, 2, 3]] * 3)

    def run(rank: int) -> tuple[int | None, int]:
        plane = planes[rank]
        x = torch.randn(layout.tokens[rank], 8)
        dispatched = plane.dispatch(x, slots[: x.shape[0]], torch.ones(x.shape[0], 4), exchange).wait()
        plane.combine(dispatched.rows_NH, dispatched.handle).wait()
        assert dispatched.num_tokens is not None, "a host plane knows"
        return dispatched.num_tokens, dispatched.rows_NH.shape[0]

    with GROUPS[backend](2) as groups, ThreadPoolExecutor(2) as pool:
        planes = [CollectivePlane(g, layout.shape(r, 8, 4, torch.float32), timeout_s=20) for r, g in enumerate(groups)]
        assert list(pool.map(run, range(2))) == [(0, 0), (3, 12)]


@pytest.mark.parametrize("backend", sorted(GROUPS))
def test_tokens_routed_under_another_placement_version_are_refused(backend: str) -> None:
    layout = Layout("ae", (1, 0), slots=1)

    def run(rank: int) -> None:
        exchange = Exchange(layer=0, version=1 + rank, tokens=layout.tokens)
        x = torch.randn(layout.tokens[rank], 8)
        slots = torch.zeros(x.shape[0], 1, dtype=torch.int64)
        planes[rank].dispatch(x, slots, torch.ones(x.shape[0], 1), exchange).wait()

    with GROUPS[backend](2) as groups, ThreadPoolExecutor(2) as pool:
        planes = [CollectivePlane(g, layout.shape(r, 8, 1, torch.float32), timeout_s=20) for r, g in enumerate(groups)]
        sender, receiver = [pool.submit(run, rank) for rank in range(2)]
        sender.result(timeout=30)
        with pytest.raises(DataPlaneError, match=r"version 1.*version 2"):
            receiver.result(timeout=30)


@pytest.mark.parametrize("backend", sorted(GROUPS))
def test_a_peer_that_went_away_is_an_error_that_names_it(backend: str) -> None:
    layout = Layout("ae", (1, 0), slots=1)
    with GROUPS[backend](2) as groups:
        plane = CollectivePlane(groups[0], layout.shape(0, 8, 1, torch.float32), timeout_s=1.0)
        exchange = Exchange(layer=0, version=1, tokens=layout.tokens)
        one = torch.zeros(1, 1, dtype=torch.int64)
        dispatched = plane.dispatch(torch.randn(1, 8), one, torch.ones(1, 1), exchange).wait()
        with pytest.raises(DataPlaneError) as caught:
            plane.combine(dispatched.rows_NH, dispatched.handle).wait()
        assert caught.value.suspects == (1,)


def test_a_combine_that_is_over_has_sent_all_of_its_answer() -> None:
    """More than the kernel holds, and nothing that comes behind it sends the rest."""
    layout, hidden = Layout("ae", (64, 0), slots=1), 32768
    exchange = Exchange(layer=0, version=1, tokens=layout.tokens)

    def run(rank: int) -> torch.Tensor:
        plane, count = planes[rank], layout.tokens[rank]
        slots = torch.zeros(count, 1, dtype=torch.int64)
        dispatched = plane.dispatch(torch.ones(count, hidden), slots, torch.ones(count, 1), exchange).wait()
        return plane.combine(dispatched.rows_NH, dispatched.handle).wait()

    with socket_group(2) as groups, ThreadPoolExecutor(2) as pool:
        planes = [
            CollectivePlane(g, layout.shape(r, hidden, 1, torch.float32), timeout_s=5) for r, g in enumerate(groups)
        ]
        outs = list(pool.map(run, range(2), timeout=20))
    assert [len(out) for out in outs] == [64, 0]
    assert bool((outs[0] == 1).all())


def test_two_ranks_that_send_much_to_each_other_do_not_block_each_other() -> None:
    def run(rank: int) -> bool:
        peer = 1 - rank
        mine = torch.full((4 << 20,), float(rank))
        theirs = torch.empty(5 << 20)
        received = groups[rank].recv([theirs], peer, 7)
        sent = groups[rank].send([mine], peer, 7)
        received.wait()
        sent.wait()
        return bool((theirs[: 4 << 20] == peer).all())

    with socket_group(2) as groups, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2), timeout=20)) == [True, True]


def test_messages_out_of_turn_and_silence_are_errors() -> None:
    with socket_group(2, timeout_s=0.5) as groups:
        groups[0].send([torch.ones(2)], 1, 1)
        with pytest.raises(DataPlaneError, match="tagged 1, expected"):
            groups[1].recv([torch.ones(2)], 0, 2).wait()
        with pytest.raises(DataPlaneError, match="silent") as caught:
            groups[0].recv([torch.ones(2)], 1, 1).wait()
        assert caught.value.suspects == (1,)
