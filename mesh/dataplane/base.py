"""The one interface of the data plane, modelled on DeepEP V2's ElasticBuffer.

There are host planes, whose exchanges are over when ``wait`` returns, and device planes, whose exchanges are work on
the current CUDA stream. What a device plane does can be captured into a CUDA graph with the rest of a step:

- nothing waits for the device: shapes follow from ``Exchange.capacity`` and the shapes of the arguments alone, and
  what depends on the tokens' choices (counts, places) stays on the device;
- ``dispatch`` and ``combine`` enqueue on the current stream or on streams of the plane that wait for it, and ``wait``
  makes the current stream wait for them, so that a capture takes all of it in;
- memory that is returned is the plane's or the capture's: it is valid until the same exchange of the next step;
- a failure of a peer shows when the host waits for the step's results, as a ``DataPlaneError`` of ``check``.

Dimensions: T tokens that this rank sends, K experts a token, H hidden size, S local slots, N rows that arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

R = TypeVar("R", covariant=True)
HandleT = TypeVar("HandleT")


class Pending(Protocol, Generic[R]):
    """An exchange under way: other work may be done until ``wait`` is called, once."""

    def wait(self) -> R:
        """Finish the exchange; of a device plane, make the current stream wait for it.

        Raises:
            DataPlaneError: a peer failed or was silent for longer than the time-out.
        """


@dataclass(frozen=True, kw_only=True)
class PlaneShape:
    """Sizes that all ranks of a view agree on."""

    rank: int
    size: int
    expert_ranks: tuple[int, ...]
    slots_per_rank: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    max_num_tokens: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """What all ranks know of one dispatch before it starts.

    ``tokens``: by rank, the tokens that it sends (T of that rank; under a CUDA graph the real ones may be fewer, and
    the others' slots are -1). ``version``: the placement version that the slots of ``layer`` were chosen under; an
    expert rank refuses another one, a device plane may leave that check to the lockstep. ``capacity``: for device
    planes, what static shapes are made from: no rank sends more tokens, all ranks have the same number.
    ``micro_batch``: 0 or 1; exchanges of the two may be under way at once, those of one follow each other.
    """

    layer: int
    version: int
    tokens: Sequence[int]
    capacity: int = 0
    micro_batch: int = 0


@dataclass(frozen=True, slots=True)
class Dispatched(Generic[HandleT]):
    """What a rank has after a dispatch.

    ``rows_NH``: one row per (token, local slot), grouped by local slot; N = 0 on a rank without slots. A device plane's
    N is what there is room for: rows of no slot hold anything. ``counts_S``: rows of each local slot, int64, or int32
    on the device. ``num_tokens``: distinct tokens among the rows, None where only the device knows. ``handle`` goes to
    ``combine``. ``starts_S``: int32 or int64 on the device, the first row of each slot, None = slots follow each other
    without gaps. ``expected_rows``: mean rows a slot to choose tiles for, None = N/S. ``factor_N``: float32 on the
    device, what each row of y has to be multiplied by before ``combine``, which then only adds up: a pass over the rows
    that the experts' last product can spare the plane. None = ``combine`` multiplies.
    """

    rows_NH: torch.Tensor
    counts_S: torch.Tensor
    num_tokens: int | None
    handle: HandleT
    starts_S: torch.Tensor | None = None
    expected_rows: float | None = None
    factor_N: torch.Tensor | None = None


class DataPlane(Protocol[HandleT]):
    """The two all-to-alls of a MoE layer. All ranks of the view call both, in the same order."""

    @property
    def is_on_device(self) -> bool:
        """A device plane: its tensors are on the GPU and a step can be captured."""

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> Pending[Dispatched[HandleT]]:
        """Send each token once to every rank that hosts one of its slots.

        Args:
            x_TH: the tokens; [0, H] on a rank without work.
            slot_TK: int64 global slots, -1 = nowhere.
            weight_TK: float32 factor of each choice in the combined sum.
        """

    def combine(self, y_NH: torch.Tensor, handle: HandleT) -> Pending[torch.Tensor]:
        """Return out[T, H] = Σ over K of weight × y of the chosen slot, in x's dtype; 0 for a token that went nowhere.

        ``y_NH``: the expert outputs in the order of ``rows_NH``, multiplied by ``factor_N`` where there is one.
        """

    def check(self, event: torch.cuda.Event | None = None) -> None:
        """Wait on the host until the device has come to ``event``, None = to the end of the current stream.

        Results of the device must not be looked at before: when a peer is lost they are not whole.

        Raises:
            DataPlaneError: a device plane lost a peer. Host planes raised it at once, and nothing is left to wait for.
        """

    def abandon(self) -> None:
        """End every wait for the device at once, from any thread: the view is over."""

    def stop(self) -> None:
        """Let nothing of it run any more. To be called before graphs with its exchanges in them are dropped.

        Raises:
            DeviceLostError: what runs on the device cannot be ended.
        """

    def close(self) -> None:
        """Drop the group; peers that still wait for this rank get an error.

        Raises:
            DeviceLostError: it cannot be dropped: this process can be in no view any more.
        """
