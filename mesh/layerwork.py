"""What all kinds of pass do with one MoE layer: where its tokens go, their exchanges, the experts' compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.mesh.dataplane import Dispatched, Exchange, Pending
from expertmesh.mesh.padding import round_up

if TYPE_CHECKING:
    from expertmesh.mesh.halves import MicroBatch
    from expertmesh.mesh.steploop import LoopContext


@dataclass(frozen=True, slots=True)
class Routed:
    """A rank's tokens before a dispatch, and the global slots and factors of their choices."""

    x_TH: torch.Tensor
    slot_TK: torch.Tensor
    weight_TK: torch.Tensor

    def part(self, start: int, end: int) -> Routed:
        """Of the tokens from ``start`` on, before ``end``."""
        part = slice(start, end)
        return Routed(self.x_TH[part], self.slot_TK[part], self.weight_TK[part])


class LayerWork:
    """The layers of one view; ``versions`` are their placements' in the step."""

    def __init__(self, context: LoopContext) -> None:
        self._c = context
        self.versions: Mapping[int, int] = context.view.versions
        device = context.device
        self._nothing = Routed(
            torch.empty(0, context.hidden_size, dtype=context.dtype, device=device),
            torch.empty(0, context.top_k, dtype=torch.int64, device=device),
            torch.empty(0, context.top_k, dtype=torch.float32, device=device),
        )

    def route(self, layer: int, tokens: MicroBatch | None, *, goes_on: bool = False) -> Routed:
        """The tokens of this rank (None = it has none) and where they go.

        ``goes_on``: they come behind others of the same step, of which the layer was asked before.
        """
        if tokens is None:
            return self._nothing
        x_TH, routes = tokens.before_experts(layer)
        observer = self._c.observer
        if routes.slot_TK is not None:
            slot_TK = routes.slot_TK
            if observer is not None:
                observer.observe_on_device(routes.expert_TK, goes_on=goes_on)
        else:
            slot_TK = self._c.routing[layer].choose(routes.expert_TK, goes_on=goes_on)
            if observer is not None:
                observer.observe(self.versions[layer], routes.expert_TK, slot_TK, goes_on=goes_on)
        return Routed(x_TH, slot_TK, routes.weight_TK)

    def dispatch(
        self, layer: int, routed: Routed, tokens: Sequence[int], micro_batch: int = 0
    ) -> Pending[Dispatched[Any]]:
        """Send at most ``max_num_tokens`` tokens a rank; ``tokens`` by rank."""
        exchange = Exchange(
            layer=layer,
            version=self.versions[layer],
            tokens=tokens,
            capacity=round_up(max(tokens)),
            micro_batch=micro_batch,
        )
        return self._c.plane.dispatch(routed.x_TH, routed.slot_TK, routed.weight_TK, exchange)

    def compute(self, layer: int, dispatched: Dispatched[Any]) -> torch.Tensor:
        """What this rank's experts answer to the rows that came."""
        y_NH = dispatched.rows_NH
        if self._c.experts is None or not y_NH.shape[0]:
            return y_NH
        return self._c.experts.compute(
            layer,
            y_NH,
            dispatched.counts_S,
            starts_S=dispatched.starts_S,
            expected_rows=dispatched.expected_rows,
            factor_N=dispatched.factor_N,
        )

    def whole(self, layer: int, batch: MicroBatch | None, tokens: Sequence[int], *, goes_on: bool = False) -> None:
        """The layer from its input to the next one's, waiting for each exchange; in parts where it has to be."""
        routed = self.route(layer, batch, goes_on=goes_on)
        self._c.clock.attention_done()
        limit = self._c.max_num_tokens
        if max(tokens) <= limit:
            out_TH = self._exchange(layer, routed, tokens, batch)
        else:
            out_TH = torch.cat(
                [
                    self._exchange(
                        layer,
                        routed.part(start, start + limit),
                        [min(limit, max(0, count - start)) for count in tokens],
                        batch if start == 0 else None,
                    )
                    for start in range(0, max(tokens), limit)
                ]
            )
        if batch is not None:
            batch.after_experts(layer, out_TH)

    def _exchange(self, layer: int, routed: Routed, tokens: Sequence[int], batch: MicroBatch | None) -> torch.Tensor:
        """Dispatch, expert compute and combine; ``batch`` is told when the layer's tokens are on their way."""
        clock = self._c.clock
        pending = self.dispatch(layer, routed, tokens)
        if batch is not None:
            batch.while_dispatched(layer)
        dispatched = pending.wait()
        clock.dispatched(layer, dispatched.num_tokens, dispatched.counts_S)
        y_NH = self.compute(layer, dispatched)
        clock.computed()
        out_TH = self._c.plane.combine(y_NH, dispatched.handle).wait()
        clock.combined()
        return out_TH
