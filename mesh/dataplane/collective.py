"""``collective``: the data plane over a ``torch.distributed`` point-to-point group (gloo on the CPU).

One message per pair of ranks and direction. A dispatch message is an int32 array [1 + n, W]: a head row, then a row
per token: hidden state, K weights, K global slots, bit-cast side by side. The receiver does not know n: it posts a
receive for as many rows as the sender has tokens, and gloo accepts a shorter message. The way back carries n rows of
the weighted sums over the receiver's slots, so both directions move a token once per rank pair, however many of its
experts live there.

The index work is done by compiled kernels (``kernels.host_exchange``): a decode step's few rows are moved in less time
than one torch operator takes to start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from expertmesh.kernels.host_exchange import host_count, host_expand, host_pack, host_sum, host_weighted_sum
from expertmesh.mesh.dataplane.base import Dispatched, Exchange, Pending, PlaneShape
from expertmesh.mesh.dataplane.transfers import MICRO_BATCHES, Kind, PointToPoint, Transfer, Transfers
from expertmesh.mesh.errors import DataPlaneError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]

_HEAD = 4  # rows of the message, layer, placement version (low and high half)
_INT32_BYTES = 4


@dataclass(slots=True)
class CollectiveHandle:
    """What combine needs of its dispatch, which was that of ``micro_batch``.

    ``token_N``: int64 [n over all destinations], the sender's token of each row it sent, by destination.
    ``sent``: rows sent to each expert rank. ``row_M`` / ``weight_M``: for each expanded row, the received row it came
    from and its factor. ``received``: (source rank, rows that came from it).
    """

    micro_batch: int
    num_tokens: int
    token_N: Ints | None
    sent: list[int]
    row_M: Ints
    weight_M: Floats
    received: list[tuple[int, int]]


class CollectivePlane:
    """Implements ``DataPlane``; see the module's docstring for the messages."""

    def __init__(self, group: PointToPoint, shape: PlaneShape, *, timeout_s: float) -> None:
        self._shape = shape
        self._hidden_words = -(-shape.hidden_size * shape.dtype.itemsize // _INT32_BYTES)
        self._row_words = max(_HEAD, self._hidden_words + 2 * shape.top_k)
        self.transfers = Transfers(group, timeout_s)
        self._expert_index = shape.expert_ranks.index(shape.rank) if shape.rank in shape.expert_ranks else None
        self._no_tokens = torch.empty(0, shape.hidden_size, dtype=shape.dtype)
        self.nothing = np.empty(0, np.int64), np.empty(0, np.float32)
        # Static memory: no step allocates a message. Pages that no step has touched take none.
        rows = shape.max_num_tokens + 1 if self._expert_index is not None else 0
        self._inboxes_RMW = np.empty((MICRO_BATCHES, shape.size, rows, self._row_words), np.int32)
        self._inboxes = torch.from_numpy(self._inboxes_RMW)
        self._outboxes_MW = [np.empty((0, self._row_words), np.int32)] * MICRO_BATCHES

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> _PendingDispatch:
        sources = self._post_receives(exchange)
        num_tokens = x_TH.shape[0]
        assert num_tokens == exchange.tokens[self._shape.rank], "the exchange announces other tokens than it is given"
        if not num_tokens:
            return _PendingDispatch(self, exchange, sources, 0, None, [])
        token_N, sent = self._send_tokens(x_TH, slot_TK, weight_TK, exchange)
        return _PendingDispatch(self, exchange, sources, num_tokens, token_N, sent)

    def combine(self, y_NH: torch.Tensor, handle: CollectiveHandle) -> _PendingCombine:
        shape = self._shape
        arrivals: list[tuple[Transfer, torch.Tensor]] = []
        back_NH = None
        if handle.token_N is not None:
            back_NH = torch.empty(len(handle.token_N), shape.hidden_size, dtype=shape.dtype)
            arrivals = self._post_returns(back_NH, handle)
        own_sum = None
        if handle.received:
            own_sum = self._return_sums(y_NH, handle)
        return _PendingCombine(self, handle, back_NH, arrivals, own_sum)

    @property
    def is_on_device(self) -> bool:
        return False

    def check(self, event: torch.cuda.Event | None = None) -> None:
        """Errors rose when they happened."""

    def abandon(self) -> None:
        """Who has the links ends every wait on them."""

    def stop(self) -> None:
        """Nothing runs but what somebody waits for."""

    def close(self) -> None:
        self.transfers.close()

    # -- sending side -------------------------------------------------------------------------------------------

    def _send_tokens(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> tuple[Ints, list[int]]:
        shape = self._shape
        num_ranks = len(shape.expert_ranks)
        token_N, sent_R = np.empty(len(slot_TK) * num_ranks, np.int64), np.empty(num_ranks, np.int64)
        if len(self._outboxes_MW[exchange.micro_batch]) < len(token_N) + num_ranks:
            self._outboxes_MW[exchange.micro_batch] = np.empty((len(token_N) + num_ranks, self._row_words), np.int32)
        message_MW = self._outboxes_MW[exchange.micro_batch]
        weight_TK = weight_TK.contiguous().view(torch.int32)
        slots = slot_TK.contiguous().numpy()
        host_pack(self._words(x_TH), weight_TK.numpy(), slots, shape.slots_per_rank, message_MW, token_N, sent_R)
        message = torch.from_numpy(message_MW)
        sent: list[int] = sent_R.tolist()
        head = exchange.layer, exchange.version & 0x7FFFFFFF, exchange.version >> 31
        start = 0
        for index, count in enumerate(sent):
            message_MW[start, 1:_HEAD] = head
            part = message[start : start + 1 + count]
            start += 1 + count
            if index == self._expert_index:
                self._inboxes[exchange.micro_batch, shape.rank, : 1 + count] = part
            else:
                self.transfers.send(part, shape.expert_ranks[index], Kind.DISPATCH, exchange.micro_batch)
        return token_N[: sum(sent)], sent

    def _words(self, x_TH: torch.Tensor) -> Words:
        """x bit-cast to int32 [T, hidden_words]."""
        padding = self._hidden_words * _INT32_BYTES // x_TH.element_size() - x_TH.shape[1]
        if padding:
            x_TH = F.pad(x_TH, (0, padding))
        words: Words = x_TH.contiguous().view(torch.int32).numpy()
        return words

    # -- receiving side -----------------------------------------------------------------------------------------

    def _post_receives(self, exchange: Exchange) -> list[Transfer]:
        if self._expert_index is None:
            return []
        inbox = self._inboxes[exchange.micro_batch]
        return [
            self.transfers.receive(inbox[rank, : count + 1], rank, Kind.DISPATCH, exchange.micro_batch)
            for rank, count in enumerate(exchange.tokens)
            if count and rank != self._shape.rank
        ]

    def arrived(self, sources: list[int], exchange: Exchange) -> _Arrived:
        """Expand the messages in the inbox by local slot."""
        shape, inbox_RMW = self._shape, self._inboxes_RMW[exchange.micro_batch]
        assert self._expert_index is not None, "only an expert rank receives tokens"
        received = [(source, self._rows_of(source, exchange)) for source in sources]
        source_I = np.array(sources)
        words, top_k = self._hidden_words, shape.top_k
        first_slot = self._expert_index * shape.slots_per_rank
        counts_S = np.empty(shape.slots_per_rank, np.int64)
        size = host_count(inbox_RMW, source_I, words + top_k, top_k, first_slot, counts_S)
        x_MW = np.empty((size, words), np.int32)
        row_M, weight_M = np.empty(size, np.int64), np.empty(size, np.int32)
        host_expand(inbox_RMW, source_I, words, top_k, first_slot, counts_S, x_MW, row_M, weight_M)
        x_MH = torch.from_numpy(x_MW).view(shape.dtype)[:, : shape.hidden_size] if size else self._no_tokens
        return _Arrived(x_MH, torch.from_numpy(counts_S), row_M, weight_M.view(np.float32), received)

    def _rows_of(self, source: int, exchange: Exchange) -> int:
        """Rows of a source's message, whose head is checked."""
        count, layer, low, high = self._inboxes_RMW[exchange.micro_batch, source, 0, :_HEAD].tolist()
        version = low | (high << 31)
        if (layer, version) != (exchange.layer, exchange.version):
            raise DataPlaneError(
                f"rank {source} sent tokens for layer {layer} under placement version {version}, "
                f"but this rank computes layer {exchange.layer} under version {exchange.version}",
                (source,),
            )
        if not 0 <= count <= exchange.tokens[source]:
            raise DataPlaneError(
                f"rank {source} announced {exchange.tokens[source]} tokens and sent {count}", (source,)
            )
        return int(count)

    # -- the way back -------------------------------------------------------------------------------------------

    def _post_returns(self, back_NH: torch.Tensor, handle: CollectiveHandle) -> list[tuple[Transfer, torch.Tensor]]:
        arrivals = []
        start = 0
        for index, count in enumerate(handle.sent):
            if count and index != self._expert_index:
                part = back_NH[start : start + count]
                source = self._shape.expert_ranks[index]
                arrivals.append((self.transfers.receive(part, source, Kind.COMBINE, handle.micro_batch), part))
            start += count
        return arrivals

    def _return_sums(self, y_MH: torch.Tensor, handle: CollectiveHandle) -> torch.Tensor | None:
        total = sum(count for _, count in handle.received)
        sum_NH = torch.empty(total, self._shape.hidden_size)
        host_weighted_sum(y_MH.float().contiguous().numpy(), handle.row_M, handle.weight_M, sum_NH.numpy())
        out_NH = sum_NH.to(self._shape.dtype)
        own, start = None, 0
        for source, count in handle.received:
            part = out_NH[start : start + count]
            start += count
            if source == self._shape.rank:
                own = part
            elif count:
                self.transfers.send(part, source, Kind.COMBINE, handle.micro_batch)
        return own

    def own_range(self, sent: list[int]) -> slice:
        """Where this rank's own part stands in the rows that come back."""
        assert self._expert_index is not None, "only a rank with slots has a part of its own"
        start = sum(sent[: self._expert_index])
        return slice(start, start + sent[self._expert_index])


@dataclass(frozen=True, slots=True)
class _Arrived:
    rows_MH: torch.Tensor
    counts_S: torch.Tensor
    row_M: Ints
    weight_M: Floats
    received: list[tuple[int, int]]


@dataclass(slots=True)
class _PendingDispatch(Pending[Dispatched[CollectiveHandle]]):
    plane: CollectivePlane
    exchange: Exchange
    sources: list[Transfer]
    num_tokens: int
    token_N: Ints | None
    sent: list[int]

    def wait(self) -> Dispatched[CollectiveHandle]:
        plane = self.plane
        for transfer in self.sources:
            plane.transfers.wait(transfer)
        sources = [transfer.peer for transfer in self.sources]
        if self.num_tokens and plane._expert_index is not None:
            sources.append(plane._shape.rank)
        if not sources:
            handle = CollectiveHandle(
                self.exchange.micro_batch, self.num_tokens, self.token_N, self.sent, *plane.nothing, []
            )
            counts_S = torch.zeros(plane._shape.slots_per_rank, dtype=torch.int64)
            return Dispatched(plane._no_tokens, counts_S, 0, handle)
        arrived = plane.arrived(sources, self.exchange)
        handle = CollectiveHandle(
            self.exchange.micro_batch,
            self.num_tokens,
            self.token_N,
            self.sent,
            arrived.row_M,
            arrived.weight_M,
            arrived.received,
        )
        num_tokens = sum(count for _, count in arrived.received)
        return Dispatched(arrived.rows_MH, arrived.counts_S, num_tokens, handle)


@dataclass(slots=True)
class _PendingCombine(Pending[torch.Tensor]):
    plane: CollectivePlane
    handle: CollectiveHandle
    back_NH: torch.Tensor | None
    arrivals: list[tuple[Transfer, torch.Tensor]]
    own_sum: torch.Tensor | None

    def wait(self) -> torch.Tensor:
        handle = self.handle
        if self.back_NH is None:
            self.plane.transfers.finish_sends(handle.micro_batch)
            return self.plane._no_tokens
        if self.own_sum is not None:
            self.back_NH[self.plane.own_range(handle.sent)] = self.own_sum
        for transfer, _ in self.arrivals:
            self.plane.transfers.wait(transfer)
        self.plane.transfers.finish_sends(handle.micro_batch)
        assert handle.token_N is not None, "rows come back only for tokens that were sent"
        out_TH = torch.empty(handle.num_tokens, self.back_NH.shape[1])
        host_sum(self.back_NH.float().numpy(), handle.token_N, out_TH.numpy())
        return out_TH.to(self.back_NH.dtype)
