"""The step loop's promise to replica choice: a step that breaks leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from expertmesh.mesh.dataplane import Dispatched
from expertmesh.mesh.errors import DataPlaneError
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.steploop import LoopContext, Progress, StepLoop
from expertmesh.v1 import mesh_pb2

HIDDEN, LAYERS = 4, (0, 1)


class Attention:
    """Sends three tokens to expert 0 in each layer; ``log`` gets the layers whose tokens were on their way."""

    def __init__(self, log: list[str], micro_batches: int) -> None:
        self._log = log
        self.micro_batches = [self] * micro_batches

    def begin(self) -> None: ...

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        return torch.zeros(3, HIDDEN), Routes(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))

    def rides_in(self, traceparent: str) -> None:
        pass

    def touched_by(self, traceparent: str, what: str) -> None:
        pass

    def while_dispatched(self, layer: int) -> None:
        self._log.append(f"shared experts {layer}")

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None: ...

    def finish(self) -> None: ...


class Plane:
    """Remembers where tokens went; breaks at the dispatch number ``breaks_at``."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.slots: list[list[int]] = []
        self.log: list[str] = []
        self._breaks_at = breaks_at

    is_on_device = False

    def dispatch(self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Any) -> Any:
        if len(self.slots) == self._breaks_at:
            raise DataPlaneError("a peer is gone")
        self.slots.append(slot_TK.ravel().tolist())
        self.log.append(f"dispatch {exchange.layer}")
        dispatched = Dispatched(torch.empty(0, HIDDEN), torch.zeros(1, dtype=torch.int64), 0, None)
        return SimpleNamespace(wait=lambda: dispatched)

    def combine(self, y_NH: torch.Tensor, handle: object) -> Any:
        self.log.append("combine")
        return SimpleNamespace(wait=lambda: torch.zeros(3, HIDDEN))


class Clock:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def tables(earlier: RoutingTables | None = None) -> RoutingTables:
    topology = Topology(slots_per_rank=1, node_R=(0, 0), server_R=("a", "b"))
    placements = [mesh_pb2.LayerPlacement(layer=layer, version=1, slots=[0, 0]) for layer in LAYERS]
    return RoutingTables(placements, 1, topology, earlier)


def loop(routing: RoutingTables, plane: Plane, micro_batches: int = 1) -> StepLoop:
    proto = mesh_pb2.View(ranks=[mesh_pb2.Rank(role=mesh_pb2.ROLE_BOTH)])
    view = SimpleNamespace(versions=dict.fromkeys(LAYERS, 1), rank=0, proto=proto)
    context = SimpleNamespace(
        view=view,
        attention=Attention(plane.log, micro_batches),
        experts=None,
        plane=plane,
        migrations=SimpleNamespace(switch=lambda ids, step: [], view=view),
        routing=routing,
        observer=None,
        moe_layers=LAYERS,
        hidden_size=HIDDEN,
        top_k=1,
        dtype=torch.float32,
        max_num_tokens=8,
        clock=Clock(),
        graphs=None,
        device=torch.device("cpu"),
    )
    return StepLoop(cast(LoopContext, context), Progress())


def test_a_step_that_broke_chooses_the_same_slots_in_the_next_view() -> None:
    go = mesh_pb2.StepGo(step=1, num_tokens=[3])
    undisturbed = Plane()
    whole = loop(tables(), undisturbed)
    for _ in range(3):
        whole.step(go)
    assert undisturbed.slots[:2] != undisturbed.slots[2:4], "a completed step moves prices"

    before, breaking, after = tables(), Plane(breaks_at=3), Plane()
    first = loop(before, breaking)
    first.step(go)
    with pytest.raises(DataPlaneError):
        first.step(go)
    second = loop(tables(before), after)
    second.step(go)
    second.step(go)
    assert breaking.slots[:2] + after.slots == undisturbed.slots


def test_shared_experts_are_computed_once_while_the_layers_tokens_are_away() -> None:
    plane = Plane()
    loop(tables(), plane).step(mesh_pb2.StepGo(step=1, num_tokens=[3]))
    layer = ["dispatch 0", "shared experts 0", "combine"]
    assert plane.log == layer + [event.replace("0", "1") for event in layer]
    in_turns = Plane()
    loop(tables(), in_turns, micro_batches=2).step(mesh_pb2.StepGo(step=1, num_tokens=[20], first_tokens=[12]))
    assert [event for event in in_turns.log if "1" not in event][: 2 * 3 + 2] == [
        *layer,
        "dispatch 0",
        "combine",
        *layer,
    ], "a micro-batch of several exchanges waits for each of them"
    in_parts = Plane()
    loop(tables(), in_parts).step(mesh_pb2.StepGo(step=1, num_tokens=[20]))
    assert in_parts.log.count("dispatch 0") == 3
    assert in_parts.log[:2] == layer[:2]
    assert in_parts.log.count("shared experts 0") == 1
