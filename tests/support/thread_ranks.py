"""Ranks with device planes on the CPU, a thread each, of which one computes at a time: Triton's interpreter is not made
for threads. What they send each other goes from hand to hand.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.nccl import NcclPlane
from expertmesh.mesh.device import CPU
from expertmesh.mesh.framing import Link
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.view import HOSTS_EXPERTS, ViewInfo
from expertmesh.v1 import mesh_pb2
from support.solo_rank import EngineRank

ROLES = {"a": mesh_pb2.ROLE_ATTENTION, "e": mesh_pb2.ROLE_EXPERT, "b": mesh_pb2.ROLE_BOTH}
_WAIT_S = 60.0
_VIEW = 1


def view_proto(spec: ModelSpec, roles: str, slots_per_rank: int) -> mesh_pb2.View:
    """Expert e is in global slot e, as far as there are experts."""
    ranks = [
        mesh_pb2.Rank(rank=rank, server_id=f"s{rank}", incarnation="1", role=ROLES[role], node="n")
        for rank, role in enumerate(roles)
    ]
    num_slots = slots_per_rank * sum(rank.role in HOSTS_EXPERTS for rank in ranks)
    slots = [slot if slot < spec.num_experts else -1 for slot in range(num_slots)]
    placement = [mesh_pb2.LayerPlacement(layer=layer, version=1, slots=slots) for layer in spec.moe_layers]
    return mesh_pb2.View(number=_VIEW, slots_per_rank=slots_per_rank, ranks=ranks, placement=placement)


def plane_shape(spec: ModelSpec, view: ViewInfo, max_num_tokens: int) -> PlaneShape:
    return PlaneShape(
        rank=view.rank,
        size=view.size,
        expert_ranks=view.expert_ranks,
        slots_per_rank=view.slots_per_rank,
        hidden_size=spec.hidden_size,
        top_k=spec.top_k,
        dtype=spec.dtype,
        max_num_tokens=max_num_tokens,
    )


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


class Hands:
    """The turn to compute, and what is under way from rank to rank, by (sender, receiver, number of the exchange). A
    rank that waits gives its turn away.
    """

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.is_broken = False
        self.under_way: dict[tuple[int, int, int], torch.Tensor] = {}

    def has_come(self, letter: tuple[int, int, int]) -> bool:
        return letter in self.under_way or self.is_broken


@dataclass
class HandExchanger:
    """Implements ``dataplane.nccl.Exchanger``: as NCCL's, a rank's n-th exchange is with the n-th of the others."""

    rank: int
    hands: Hands
    number: int = 0

    def exchange(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Any:
        self.number += 1
        for peer, part in enumerate(inputs):
            self.hands.under_way[self.rank, peer, self.number] = part.clone()
        self.hands.turn.notify_all()
        return _Handing(self, outputs, self.number)

    def leave(self) -> bool:
        return True

    def abort(self) -> None:
        """There is nothing to drop."""


@dataclass
class _Handing:
    exchanger: HandExchanger
    outputs: list[torch.Tensor]
    number: int

    def wait(self) -> None:
        hands, rank = self.exchanger.hands, self.exchanger.rank
        for peer, output in enumerate(self.outputs):
            letter = peer, rank, self.number
            hands.turn.wait_for(partial(hands.has_come, letter), _WAIT_S)
            assert letter in hands.under_way, f"nothing came from rank {peer}"
            part = hands.under_way.pop(letter)
            assert part.shape == output.shape, f"rank {peer} sent {part.shape}, {output.shape} was expected"
            output.copy_(part)


class ThreadRanks:
    """``start`` them once something is submitted, then ``wait``; ``goes`` are the steps of each rank."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, roles: str, slots_per_rank: int, **config: Any) -> None:
        hands, size = Hands(), len(roles)
        self._hands = hands
        self._known_view = _VIEW
        proto = view_proto(spec, roles, slots_per_rank)
        links: list[dict[int, Link]] = [{} for _ in range(size)]
        for follower in range(1, size):
            ours, theirs = _tcp_pair()
            links[0][follower], links[follower][0] = Link(ours, follower), Link(theirs, 0)
        self._links = links
        self.ranks: list[EngineRank] = []
        for number in range(size):
            view = ViewInfo(proto, number)
            plane = NcclPlane(HandExchanger(number, hands), plane_shape(spec, view, 64), CPU, timeout_s=5)
            self.ranks.append(
                EngineRank(
                    spec,
                    checkpoint,
                    CPU,
                    view,
                    plane,
                    links[number],
                    next_view=lambda: self._known_view,
                    pads=True,
                    **config,
                )
            )
        self.goes: list[list[mesh_pb2.StepGo]] = [[] for _ in range(size)]
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(rank,), daemon=True) for rank in range(size)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        rank = self.ranks[number]
        try:
            with torch.inference_mode():
                while True:
                    go = rank.loop.exchange()
                    self.goes[number].append(go)
                    if go.stop:
                        return
                    with self._hands.turn:
                        rank.loop.step(go)
                        self._hands.turn.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised where the test waits
            self._errors.append(error)
            with self._hands.turn:
                self._hands.is_broken = True
                self._hands.turn.notify_all()
            for link in self._links[number].values():
                link.close()

    def wait(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Until each (rank, handle) has its end, then for the end of the view."""

        def is_over() -> bool:
            outputs = [self.ranks[rank].outputs.get(handle) for rank, handle in wanted]
            return bool(self._errors) or all(found and found[-1].finish for found in outputs)

        with self._hands.turn:
            is_whole = self._hands.turn.wait_for(is_over, _WAIT_S)
        self._known_view = _VIEW + 1
        for rank in self.ranks:
            rank.wake()
        for thread in self._threads:
            thread.join(_WAIT_S)
        if self._errors:
            raise self._errors[0]
        assert is_whole, "not all sequences ended"

    def close(self) -> None:
        for rank, links in zip(self.ranks, self._links, strict=True):
            rank.close()
            for link in links.values():
                link.close()
