"""Two micro-batches in turns: one order of exchanges on all ranks, each answer to its own tokens, and what overlaps."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from expertmesh.mesh.dataplane import DataPlane, Dispatched
from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.collective import CollectivePlane
from expertmesh.mesh.halves import MicroBatch, Routes
from expertmesh.mesh.layerwork import LayerWork
from expertmesh.mesh.pingpong import PingPong
from expertmesh.mesh.steploop import LoopContext, tokens_of
from expertmesh.v1 import mesh_pb2
from support.groups import GROUPS
from support.thread_ranks import ROLES

LAYERS = (1, 2, 4)
SLOTS, TOP_K = 2, 2


class Batch:
    """Tokens whose residual stream grows by what the experts answer; ``log`` gets what is computed."""

    def __init__(self, x_TH: torch.Tensor, slot_LTK: torch.Tensor, name: int, log: list[str]) -> None:
        self.x_TH, self._slot_LTK, self._name, self._log = x_TH, slot_LTK, name, log
        self.num_tokens = len(x_TH)

    def begin(self) -> None:
        self._log.append(f"begin {self._name}")

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        slot_TK = self._slot_LTK[LAYERS.index(layer)]
        return self.x_TH, Routes(slot_TK, torch.full(slot_TK.shape, 0.5), slot_TK)

    def while_dispatched(self, layer: int) -> None:
        """No shared experts."""

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        self._log.append(f"attention {self._name}")
        self.x_TH = self.x_TH + out_TH


def expert(slot: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A function of its own for each global slot."""
    return x * (0.1 * (slot + 1)).unsqueeze(-1) + 0.01 * slot.unsqueeze(-1)


@dataclass
class Experts:
    first_slot: int
    log: list[str] = field(default_factory=list)

    def compute(self, layer: int, rows_NH: torch.Tensor, counts_S: torch.Tensor, **_: Any) -> torch.Tensor:
        self.log.append("experts")
        return expert(torch.repeat_interleave(torch.arange(SLOTS), counts_S) + self.first_slot, rows_NH)


class Clock:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def ping_pong(roles: str, rank: int, plane: Any, log: list[str]) -> PingPong:
    hosts = [place for place, role in enumerate(roles) if role in "eb"]
    view = SimpleNamespace(
        versions=dict.fromkeys(LAYERS, 1),
        proto=mesh_pb2.View(ranks=[mesh_pb2.Rank(role=ROLES[role]) for role in roles]),
    )
    context = SimpleNamespace(
        view=view,
        experts=Experts(hosts.index(rank) * SLOTS, log) if rank in hosts else None,
        plane=plane,
        observer=None,
        hidden_size=4,
        top_k=TOP_K,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    work, clock = LayerWork(cast(LoopContext, context)), cast(Any, Clock())
    return PingPong(work, cast(DataPlane[Any], plane), clock, cast(Any, view))


class LoggingPlane:
    """Nobody answers; ``log`` gets the exchanges as they begin (D, C) and are waited for (d, c)."""

    def __init__(self, log: list[str], has_slots: bool) -> None:
        self._log, self._rows = log, int(has_slots)

    def _pending(self, name: str, result: Any) -> Any:
        self._log.append(name)

        def wait() -> Any:
            self._log.append(name.lower())
            return result

        return SimpleNamespace(wait=wait)

    def dispatch(self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Any) -> Any:
        counts_S = torch.tensor([self._rows] + [0] * (SLOTS - 1))
        name = f"{exchange.micro_batch} {exchange.layer}"
        return self._pending(f"D{name}", Dispatched(torch.zeros(self._rows, 4), counts_S, 0, (name, len(x_TH))))

    def combine(self, y_NH: torch.Tensor, handle: tuple[str, int]) -> Any:
        return self._pending(f"C{handle[0]}", torch.zeros(handle[1], 4))


def events(roles: str, rank: int, own: Sequence[int], tokens: list[list[int]]) -> list[str]:
    log: list[str] = []
    plane = LoggingPlane(log, roles[rank] in "eb")
    slot_LTK = torch.zeros(len(LAYERS), 1, TOP_K, dtype=torch.int64)
    batches = [
        cast(MicroBatch, Batch(torch.zeros(count, 4), slot_LTK.expand(-1, count, -1), index, log)) if count else None
        for index, count in enumerate(own)
    ]
    ping_pong(roles, rank, plane, log).run(LAYERS, batches, tokens)
    return log


APART = "D0 1,D1 1,C0 1,D0 2,C1 1,D1 2,C0 2,D0 4,C1 2,D1 4,C0 4,C1 4"
TOGETHER = "D0 1,D1 1,C0 1,C1 1,D0 2,D1 2,C0 2,C1 2,D0 4,D1 4,C0 4,C1 4"


@pytest.mark.parametrize(("roles", "order"), [("ae", APART), ("aaee", APART), ("bb", TOGETHER), ("abe", TOGETHER)])
def test_all_ranks_begin_exchanges_in_one_order(roles: str, order: str) -> None:
    """Also those with tokens in the first micro-batch only, or in none; whatever is begun is waited for once."""
    for counts in ((3, 2), (3, 0), (0, 0)):
        for rank, role in enumerate(roles):
            own = counts if role in "ab" else (0, 0)
            log = events(roles, rank, own, [[2] * len(roles)] * 2)
            begun = [event for event in log if event[0] in "DC"]
            assert begun == order.split(","), (role, counts)
            waited = [event for event in log if event[0] in "dc" and event[1].isdigit()]
            assert sorted(waited) == sorted(event.lower() for event in begun), (role, counts)


def test_what_a_rank_computes_while_an_exchange_is_under_way() -> None:
    attention = events("ae", 0, (1, 1), [[1, 0]] * 2)
    assert attention[:8] == ["begin 0", "D0 1", "begin 1", "D1 1", "d0 1", "C0 1", "c0 1", "attention 0"]
    assert attention[8:13] == ["D0 2", "d1 1", "C1 1", "c1 1", "attention 1"], "D0 2 is under way"
    experts = events("ae", 1, (0, 0), [[1, 0]] * 2)
    assert experts[:9] == ["D0 1", "D1 1", "d0 1", "experts", "C0 1", "D0 2", "d1 1", "experts", "C1 1"], (
        "it waits for no combine"
    )
    both = events("bb", 0, (1, 1), [[1, 1]] * 2)
    assert both[4:12] == ["d0 1", "experts", "C0 1", "d1 1", "experts", "C1 1", "c0 1", "attention 0"]
    assert both[12:18] == ["D0 2", "c1 1", "attention 1", "D1 2", "d0 2", "experts"]


@pytest.mark.parametrize("backend", sorted(GROUPS))
@pytest.mark.parametrize("roles", ["ae", "aaee", "bb", "abe"])
def test_every_answer_goes_to_its_own_tokens(roles: str, backend: str) -> None:
    """Over real transports; a rank has no second micro-batch, another no tokens."""
    counts = {"a": [(3, 2), (4, 0)], "b": [(5, 3), (2, 1)], "e": [(0, 0)] * 2}
    run_through(roles, backend, [counts[role][roles[:rank].count(role)] for rank, role in enumerate(roles)], 8)
    run_through(roles, backend, [(1, 0) if rank == 0 else (0, 0) for rank in range(len(roles))], 8)


@pytest.mark.parametrize("roles", ["ae", "bb", "abe"])
def test_messages_beyond_what_the_kernel_holds_do_not_block(roles: str) -> None:
    own = [(24, 24) if role in "ab" else (0, 0) for role in roles]
    run_through(roles, "tcp", own, 8192, kernel_bytes=1 << 14)


def run_through(
    roles: str, backend: str, own: Sequence[tuple[int, int]], hidden: int, kernel_bytes: int | None = None
) -> None:
    """All ranks, a thread each; the residual streams have to be those of a plain sum.

    ``kernel_bytes``: of a link's buffers.
    """
    hosts = [place for place, role in enumerate(roles) if role in "eb"]
    generator = torch.Generator().manual_seed(len(roles) + hidden)
    go = mesh_pb2.StepGo(num_tokens=[sum(counts) for counts in own], first_tokens=[first for first, _ in own])
    tokens = tokens_of(go)
    assert tokens == [list(counts) for counts in zip(*own, strict=True)]
    batches = [
        [
            Batch(
                torch.randn(count, hidden, generator=generator),
                torch.rand(len(LAYERS), count, SLOTS * len(hosts), generator=generator).topk(TOP_K).indices,
                index,
                [],
            )
            for index, count in enumerate(counts)
        ]
        for counts in own
    ]
    wanted = [[_through(batch) for batch in pair] for pair in batches]

    def run(rank: int) -> None:
        pair = [cast(MicroBatch, batch) if batch.num_tokens else None for batch in batches[rank]]
        with torch.inference_mode():
            ping_pong(roles, rank, planes[rank], []).run(LAYERS, pair, tokens)

    with GROUPS[backend](len(roles)) as groups:
        for peer in [peer for group in groups if kernel_bytes for peer in cast(Any, group)._peers.values()]:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                peer.sock.setsockopt(socket.SOL_SOCKET, option, kernel_bytes)
        planes = [
            CollectivePlane(
                group,
                PlaneShape(
                    rank=rank,
                    size=len(roles),
                    expert_ranks=tuple(hosts),
                    slots_per_rank=SLOTS,
                    hidden_size=hidden,
                    top_k=TOP_K,
                    dtype=torch.float32,
                    max_num_tokens=256,
                ),
                timeout_s=20,
            )
            for rank, group in enumerate(groups)
        ]
        with ThreadPoolExecutor(len(roles)) as pool:
            list(pool.map(run, range(len(roles)), timeout=60))
    for pair, streams in zip(batches, wanted, strict=True):
        for batch, stream in zip(pair, streams, strict=True):
            torch.testing.assert_close(batch.x_TH, stream)


def _through(batch: Batch) -> torch.Tensor:
    x_TH = batch.x_TH
    for slot_TK in batch._slot_LTK:
        x_TH = x_TH + sum(0.5 * expert(slot_TK[:, k], x_TH) for k in range(TOP_K))
    return x_TH
