"""A step's pass through the layers in two micro-batches that take turns.

While the tokens of one are under way or with the experts, this rank computes the other's attention or experts: the
ping-pong of attention and expert ranks of MegaScale-Infer (arXiv:2504.02263, section 4.1) and Step-3
(arXiv:2507.19427), and on ranks with both halves the overlap of two batches of DeepSeek-V3 (arXiv:2412.19437, section
3.2.1).

All ranks begin the exchanges of a step in one order, which follows from the view alone. With D and C for dispatch and
combine, the number of the micro-batch and a dash for the layer behind:

- apart (no rank has both halves): ``D0 D1 | C0 D0' C1 D1' | ...``: a micro-batch's next dispatch need not wait for what
  experts do with the other one.
- together: ``D0 D1 | C0 C1 D0' D1' | ...``: a rank has the other's experts to compute while C0 is under way, and the
  first one's attention during C1.

A rank waits for an exchange as late as it can: where the other micro-batch is all that it could compute meanwhile. A
rank without tokens in a micro-batch takes part with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.mesh.dataplane import DataPlane, Dispatched, Pending
from expertmesh.mesh.halves import MicroBatch
from expertmesh.mesh.layerwork import LayerWork, Routed
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2


@dataclass(slots=True)
class _Turn:
    """A micro-batch on its way: ``batch`` None = this rank has none of its ``tokens``, which are by rank.

    What an exchange sends is kept until its combine is over: a device plane reads it until then.
    """

    index: int
    batch: MicroBatch | None
    tokens: Sequence[int]
    routed: Routed | None = None
    arriving: Pending[Dispatched[Any]] | None = None
    dispatched: Dispatched[Any] | None = None
    answer_NH: torch.Tensor | None = None
    returning: Pending[torch.Tensor] | None = None


class PingPong:
    """The passes of one view."""

    def __init__(self, work: LayerWork, plane: DataPlane[Any], clock: StepClock, view: ViewInfo) -> None:
        self._work = work
        self._plane = plane
        self._clock = clock
        self._is_apart = all(rank.role != mesh_pb2.ROLE_BOTH for rank in view.proto.ranks)

    def run(self, layers: Sequence[int], batches: Sequence[MicroBatch | None], tokens: Sequence[Sequence[int]]) -> None:
        """All MoE layers for two micro-batches; ``tokens`` by micro-batch and rank, no more than an exchange takes.

        Raises:
            DataPlaneError: a peer failed.
        """
        turns = [_Turn(index, batch, counts) for index, (batch, counts) in enumerate(zip(batches, tokens, strict=True))]
        for turn in turns:
            if turn.batch is not None:
                turn.batch.begin()
            self._send(turn, layers[0])
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if self._is_apart:
                for turn in turns:
                    self._serve(turn, layer)
                    self._go_on(turn, layer, following)
            else:
                for turn in turns:
                    self._serve(turn, layer)
                for turn in turns:
                    self._go_on(turn, layer, following)
        for turn in turns:
            self._take_back(turn)

    def _send(self, turn: _Turn, layer: int) -> None:
        """Begin the dispatch of a layer, then compute what is due while it is under way."""
        routed = self._work.route(layer, turn.batch, goes_on=turn.index > 0)
        self._clock.attention_done()
        turn.arriving = self._work.dispatch(layer, routed, turn.tokens, turn.index)
        turn.routed = routed
        self._clock.sent(turn.index)
        if turn.batch is not None:
            turn.batch.while_dispatched(layer)
            self._clock.attention_done()

    def _serve(self, turn: _Turn, layer: int) -> None:
        """Compute what has come for this rank's experts and begin the combine."""
        self._take_back(turn)
        assert turn.arriving is not None, "a dispatch comes before its layer's experts"
        dispatched = turn.dispatched = turn.arriving.wait()
        turn.arriving = None
        self._clock.dispatched(layer, dispatched.num_tokens, dispatched.counts_S, turn.index)
        turn.answer_NH = self._work.compute(layer, dispatched)
        self._clock.computed(turn.index)
        turn.returning = self._plane.combine(turn.answer_NH, dispatched.handle)

    def _go_on(self, turn: _Turn, layer: int, following: int | None) -> None:
        """From what the experts answered up to the dispatch of the next layer.

        A rank without tokens waits for no answer, so that its experts can go on with the other micro-batch.
        """
        if turn.batch is not None:
            out_TH = self._take_back(turn)
            assert out_TH is not None, "a combine was begun"
            turn.batch.after_experts(layer, out_TH)
        if following is not None:
            self._send(turn, following)

    def _take_back(self, turn: _Turn) -> torch.Tensor | None:
        """Wait for the combine that was begun, if any."""
        if turn.returning is None:
            return None
        out_TH = turn.returning.wait()
        self._clock.combined(turn.index)
        turn.returning = turn.answer_NH = turn.dispatched = None
        return out_TH
