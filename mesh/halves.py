"""What the step loop asks of the two halves of a rank. attention_server/ and expert_server/ implement them.

Dimensions: T tokens of this rank in the step, H hidden size, K experts a token, S local slots, N received rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from expertmesh.mesh.device_routing import DeviceRouting
    from expertmesh.mesh.padding import PaddedStep
    from expertmesh.mesh.placement import RoutingTables, Topology


@dataclass(frozen=True, slots=True)
class Routes:
    """What the gate chose for each token of a rank.

    ``expert_TK``: int64 expert ids of the layer. ``weight_TK``: float32, as the combine multiplies them. ``slot_TK``:
    int64 global slots, where the gate has chosen them too (on a device); -1 = the token is padding.
    """

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    slot_TK: torch.Tensor | None = None


ExpertWeights = tuple[torch.Tensor, ...]
"""The tensors of one expert, each contiguous; all expert halves of a mesh have the same number, shapes and dtype."""


@dataclass(frozen=True, slots=True)
class SlotChange:
    """A local slot is about to hold another expert: -1 with no weights = it becomes empty."""

    slot: int
    expert: int
    weights: ExpertWeights | None


class StagingFullError(RuntimeError):
    """An expert half has no room to stage so many experts."""


class MicroBatch(Protocol):
    """A batch, or a part of one, on its way through the layers.

    ``begin`` → (``before_experts`` → ``while_dispatched`` → ``after_experts``) for each MoE layer in order. Those of a
    step may take turns between these calls, except that ``while_dispatched`` follows ``before_experts`` at once.
    """

    @property
    def num_tokens(self) -> int:
        """T."""

    def begin(self) -> None:
        """Embed the tokens and compute up to the first MoE layer's input."""

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        """The MoE block's normed input x[T, H] and its routes."""

    def while_dispatched(self, layer: int) -> None:
        """The layer's tokens are on their way: time to compute shared experts, whose answer ``after_experts`` adds."""

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        """Add the routed experts' sum (and shared experts) to the residual and compute up to the next MoE layer."""


class AttentionHalf(Protocol):
    """Everything dense and everything with state per request. Called from the step thread only, but for ``set_waker``.

    A step is ``prepare`` → the calls of each of its ``micro_batches`` → ``finish``. Until ``finish`` returns, nothing
    that a client can see has changed: a step that broke in the middle is run again from ``begin`` with the same batch,
    writing the same KV positions.
    """

    def set_waker(self, wake: Callable[[], None]) -> None:
        """``wake`` is thread-safe; call it when an idle half has got work."""

    def prepare(self) -> int:
        """Choose the batch of the next step, or keep the prepared one; returns its tokens T (0 = nothing to do)."""

    def traceparent(self) -> str:
        """W3C trace context of a sampled request in the prepared batch whose step is due to be traced, or ''."""

    def rides_in(self, traceparent: str) -> None:
        """The prepared batch is computed by the sampled step whose span it is: link its traced requests to it."""

    def touched_by(self, traceparent: str, what: str) -> None:
        """A migration or a view change (``what``) happened: link all traced requests to its span."""

    @property
    def first_tokens(self) -> int:
        """Of the prepared batch's tokens, those in the first of two micro-batches; 0 = it is to be computed as one."""

    @property
    def micro_batches(self) -> Sequence[MicroBatch]:
        """The prepared batch, or its two micro-batches, a sequence wholly in one of them; [] = there is none."""

    def finish(self) -> None:
        """Logits, sampling, stop conditions; hand new tokens to the links; advance the sequences."""

    def set_serving(self, serving: bool, reason: str = "") -> None:
        """The rank entered or left a view that steps."""


class DeviceAttentionHalf(AttentionHalf, Protocol):
    """An attention half on a GPU: what its micro-batches compute is work on the current stream that a CUDA graph may
    hold, and a step's tokens come to the host after the next step has begun.

    ``finish`` hands out the tokens of the step before; ``prepare`` does so too where nothing can be prepared without
    them.
    """

    def bind(self, routing: RoutingTables, topology: Topology, check: Callable[[torch.cuda.Event], None]) -> None:
        """A view begins: route by its tables. Steps that had not been handed out are run again.

        ``check`` waits for the device; what it raises ends the view, and the step is not handed out.
        """

    @property
    def routing(self) -> DeviceRouting:
        """The tables and counts of the view."""

    def stage(self, padded: PaddedStep | None) -> None:
        """Bring the prepared batch to the device; ``micro_batches`` then has what is there.

        ``padded``: each micro-batch is padded to its size, and what the prepared batch has not is padding alone; None =
        eagerly, as they are.
        """

    def stage_nothing(self, padded: PaddedStep) -> None:
        """Bring a step that is all padding to the device: to capture a graph with, and where the step is that of other
        ranks."""

    def stage_chunk_of_nothing(self, size: int) -> None:
        """As ``stage_nothing``, for a step with chunks of prompts of which no graph is made."""

    @property
    def is_decode(self) -> bool:
        """The prepared batch has one token a sequence: it may be padded, and a graph can serve it."""

    def fits(self, padded: PaddedStep) -> bool:
        """The prepared batch may be padded to this step with chunks: there are places for all that it has."""


class ExpertHalf(Protocol):
    """Slots and the expert MLP.

    ``load``, ``compute`` and ``commit`` are called from the step thread; ``reserve``, ``read`` and ``fetch`` from the
    thread that stages migrations, ``release`` from any. Slots hold still but for ``load`` and ``commit``.
    """

    @property
    def num_slots(self) -> int:
        """S: slots a layer."""

    def load(self, placement: Mapping[int, Sequence[int]]) -> None:
        """Make local slot s of layer l hold expert ``placement[l][s]`` (-1 = empty).

        What no slot of this server holds yet is read from the checkpoint.
        """

    def compute(
        self,
        layer: int,
        rows_NH: torch.Tensor,
        counts_S: torch.Tensor,
        *,
        starts_S: torch.Tensor | None = None,
        expected_rows: float | None = None,
        factor_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The expert MLP on rows grouped by local slot: the first ``counts_S[0]`` rows go through slot 0, and so on.

        ``counts_S`` is int64 on the CPU or the device. ``starts_S``, ``expected_rows`` and ``factor_N`` come from
        device planes alone (see ``Dispatched``). Returns y[N, H].
        """

    def memory(self) -> Sequence[torch.Tensor]:
        """The tensors that ``read`` and ``reserve`` give parts of from now on; they stay where they are."""

    def reserve(self, num_experts: int) -> list[ExpertWeights]:
        """Staging memory for so many experts; its contents are undefined.

        Raises:
            StagingFullError: what is reserved already leaves no room for them.
        """

    def release(self, staged: Sequence[ExpertWeights]) -> None:
        """Give staging memory back."""

    def read(self, layer: int, slot: int) -> ExpertWeights:
        """The weights of a local slot, where they are: to be read only, until the next ``commit`` of the layer."""

    def fetch(self, layer: int, expert: int, into: ExpertWeights) -> None:
        """Read an expert from the checkpoint into staging memory.

        Raises:
            UserError: the checkpoint cannot be read.
        """

    def commit(self, layer: int, changes: Sequence[SlotChange]) -> None:
        """Switch slots of a layer to what was staged for them, between two steps: this must take far less than one.

        A device half whose slots are behind a table of indices may keep the staged memory and only change the table.
        """
