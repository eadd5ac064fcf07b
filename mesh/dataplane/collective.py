"""``collective``: the data plane over a ``torch.distributed`` point-to-point group (gloo on the CPU).

One message per pair of ranks and direction. A dispatch message is an int32 array [1 + n, W]: a head row, then a row
per token: hidden state, K weights, K global slots, bit-cast side by side. The receiver does not know n: it posts a
receive for as many rows as the sender has tokens, and gloo accepts a shorter message. The way back carries n rows of
the weighted sums over the receiver's slots, so both directions move a token once per rank pair, however many of its
experts live there.

The index arithmetic is NumPy's: at the sizes of a decode step an operation of it costs a third of one of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from expertmesh.mesh.dataplane.base import Dispatched, Exchange, Pending
from expertmesh.mesh.errors import DataPlaneError

_DISPATCH_TAG = 1
_COMBINE_TAG = 2
_HEAD = 4  # rows of the message, layer, placement version (low and high half)
_INT32_BYTES = 4


class Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class PointToPoint(Protocol):
    """What this module needs of a process group."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...


@dataclass(frozen=True, slots=True)
class _Transfer:
    work: Work
    peer: int


@dataclass(slots=True)
class CollectiveHandle:
    """What combine needs of its dispatch.

    ``token_N``: int64 [n over all destinations], the sender's token of each row it sent, by destination.
    ``sent``: rows sent to each expert rank. ``row_M`` / ``weight_M1``: for each expanded row, the received row it came
    from and its factor. ``received``: (source rank, rows that came from it).
    """

    num_tokens: int
    token_N: torch.Tensor | None
    sent: list[int]
    row_M: torch.Tensor
    weight_M1: torch.Tensor
    received: list[tuple[int, int]]


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

    @property
    def hidden_words(self) -> int:
        return -(-self.hidden_size * self.dtype.itemsize // _INT32_BYTES)

    @property
    def row_words(self) -> int:
        return max(_HEAD, self.hidden_words + 2 * self.top_k)


class CollectivePlane:
    """Implements ``DataPlane``; see the module's docstring for the messages."""

    def __init__(self, group: PointToPoint, shape: PlaneShape, *, timeout_s: float) -> None:
        self._group: PointToPoint | None = group
        self._shape = shape
        self._timeout = timedelta(seconds=timeout_s)
        self._sends: list[_Transfer] = []
        self._expert_index = shape.expert_ranks.index(shape.rank) if shape.rank in shape.expert_ranks else None
        self._no_tokens = torch.empty(0, shape.hidden_size, dtype=shape.dtype)
        self._no_rows = torch.empty(0, dtype=torch.int64)
        self._inbox: dict[int, torch.Tensor] = {}

    def dispatch(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> _PendingDispatch:
        sources = self._post_receives(exchange.tokens)
        num_tokens = x_TH.shape[0]
        assert num_tokens == exchange.tokens[self._shape.rank], "the exchange announces other tokens than it is given"
        if not num_tokens:
            return _PendingDispatch(self, exchange, sources, None, 0, None, [])
        token_N, sent, own_rows = self._send_tokens(x_TH, slot_TK, weight_TK, exchange)
        return _PendingDispatch(self, exchange, sources, own_rows, num_tokens, token_N, sent)

    def combine(self, y_NH: torch.Tensor, handle: CollectiveHandle) -> _PendingCombine:
        shape = self._shape
        arrivals: list[tuple[_Transfer, torch.Tensor]] = []
        back_NH = None
        if handle.token_N is not None:
            back_NH = torch.empty(handle.token_N.shape[0], shape.hidden_size, dtype=shape.dtype)
            arrivals = self._post_returns(back_NH, handle.sent)
        own_sum = None
        if handle.received:
            own_sum = self._return_sums(y_NH, handle)
        return _PendingCombine(self, handle, back_NH, arrivals, own_sum)

    def close(self) -> None:
        self._sends.clear()
        self._inbox.clear()
        self._group = None

    # -- sending side -------------------------------------------------------------------------------------------

    def _send_tokens(
        self, x_TH: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, exchange: Exchange
    ) -> tuple[torch.Tensor, list[int], torch.Tensor | None]:
        self._finish_sends()
        shape = self._shape
        slots = slot_TK.numpy()
        # Choices that go nowhere have home -1, the last column, which is cut off.
        visits_TR = np.zeros((len(slots), len(shape.expert_ranks) + 1), dtype=np.bool_)
        visits_TR[np.arange(len(slots))[:, None], slots // shape.slots_per_rank] = True
        rank_N, token_N = np.nonzero(visits_TR[:, :-1].T)
        sent: list[int] = np.bincount(rank_N, minlength=len(shape.expert_ranks)).tolist()
        message_W = np.empty((len(token_N) + len(sent), shape.row_words), dtype=np.int32)
        row_N = np.arange(1, len(token_N) + 1) + rank_N  # behind the heads of its own and all earlier destinations
        words, top_k = shape.hidden_words, shape.top_k
        message_W[row_N, :words] = self._words(x_TH)[token_N]
        message_W[row_N, words : words + top_k] = weight_TK.view(torch.int32).numpy()[token_N]
        message_W[row_N, words + top_k : words + 2 * top_k] = slots[token_N]
        head = (exchange.layer, exchange.version & 0x7FFFFFFF, exchange.version >> 31)
        message = torch.from_numpy(message_W)
        own_rows = None
        start = 0
        for index, count in enumerate(sent):
            message_W[start, :_HEAD] = (count, *head)
            part = message[start : start + 1 + count]
            start += 1 + count
            if index == self._expert_index:
                own_rows = part
            else:
                self._send(part, shape.expert_ranks[index], _DISPATCH_TAG)
        return torch.from_numpy(token_N), sent, own_rows

    def _words(self, x_TH: torch.Tensor) -> npt.NDArray[np.int32]:
        """x bit-cast to int32 [T, hidden_words]."""
        padding = self._shape.hidden_words * _INT32_BYTES // x_TH.element_size() - x_TH.shape[1]
        if padding:
            x_TH = F.pad(x_TH, (0, padding))
        words: npt.NDArray[np.int32] = x_TH.contiguous().view(torch.int32).numpy()
        return words

    # -- receiving side -----------------------------------------------------------------------------------------

    def _post_receives(self, tokens: Sequence[int]) -> list[tuple[_Transfer, torch.Tensor]]:
        if self._expert_index is None:
            return []
        sources = []
        for rank, count in enumerate(tokens):
            if count and rank != self._shape.rank:
                buffer = self._inbox_of(rank, count)
                sources.append((self._receive(buffer, rank, _DISPATCH_TAG), buffer))
        return sources

    def _inbox_of(self, rank: int, count: int) -> torch.Tensor:
        """Static memory for one source's messages, so that no step allocates it."""
        inbox = self._inbox.get(rank)
        if inbox is None:
            rows = self._shape.max_num_tokens + 1
            inbox = self._inbox[rank] = torch.empty(rows, self._shape.row_words, dtype=torch.int32)
        return inbox[: count + 1]

    def arrived(self, messages: list[tuple[int, torch.Tensor]], exchange: Exchange) -> _Arrived:
        """Expand received messages (source rank, rows with their head) by local slot."""
        shape = self._shape
        parts, received = [], []
        for source, message in messages:
            row_W = message.numpy()
            count, layer, low, high = row_W[0, :_HEAD].tolist()
            version = low | (high << 31)
            if (layer, version) != (exchange.layer, exchange.version):
                raise DataPlaneError(
                    f"rank {source} sent tokens for layer {layer} under placement version {version}, "
                    f"but this rank computes layer {exchange.layer} under version {exchange.version}",
                    (source,),
                )
            parts.append(row_W[1 : 1 + count])
            received.append((source, count))
        row_W = parts[0] if len(parts) == 1 else np.concatenate(parts)
        words, top_k, num_slots = shape.hidden_words, shape.top_k, shape.slots_per_rank
        assert self._expert_index is not None, "only an expert rank receives tokens"
        local_C = row_W[:, words + top_k : words + 2 * top_k].reshape(-1) - self._expert_index * num_slots
        # Choices of other ranks count as one slot more; they sort behind the local ones and are cut off.
        local_C[(local_C < 0) | (local_C >= num_slots)] = num_slots
        counts = np.bincount(local_C, minlength=num_slots + 1)
        order_M = np.argsort(local_C, kind="stable")[: len(local_C) - counts[num_slots]]
        row_M = order_M // top_k
        x_MH = self._no_tokens
        if len(row_M):
            x_MH = torch.from_numpy(np.take(row_W[:, :words], row_M, axis=0)).view(shape.dtype)
            x_MH = x_MH[:, : shape.hidden_size]
        weight_M = row_W[:, words : words + top_k].reshape(-1)[order_M]
        return _Arrived(
            x_MH,
            torch.from_numpy(counts[:num_slots]),
            torch.from_numpy(row_M),
            torch.from_numpy(weight_M).view(torch.float32).unsqueeze(1),
            received,
        )

    # -- the way back -------------------------------------------------------------------------------------------

    def _post_returns(self, back_NH: torch.Tensor, sent: list[int]) -> list[tuple[_Transfer, torch.Tensor]]:
        arrivals = []
        start = 0
        for index, count in enumerate(sent):
            if count and index != self._expert_index:
                part = back_NH[start : start + count]
                arrivals.append((self._receive(part, self._shape.expert_ranks[index], _COMBINE_TAG), part))
            start += count
        return arrivals

    def _return_sums(self, y_MH: torch.Tensor, handle: CollectiveHandle) -> torch.Tensor | None:
        self._finish_sends()
        total = sum(count for _, count in handle.received)
        sum_NH = torch.zeros(total, self._shape.hidden_size, dtype=torch.float32)
        sum_NH.index_add_(0, handle.row_M, y_MH * handle.weight_M1)
        out_NH = sum_NH.to(self._shape.dtype)
        own, start = None, 0
        for source, count in handle.received:
            part = out_NH[start : start + count]
            start += count
            if source == self._shape.rank:
                own = part
            elif count:
                self._send(part, source, _COMBINE_TAG)
        return own

    def own_range(self, sent: list[int]) -> slice:
        """Where this rank's own part stands in the rows that come back."""
        assert self._expert_index is not None, "only a rank with slots has a part of its own"
        start = sum(sent[: self._expert_index])
        return slice(start, start + sent[self._expert_index])

    # -- transfers ----------------------------------------------------------------------------------------------

    def _send(self, tensor: torch.Tensor, peer: int, tag: int) -> None:
        assert self._group is not None, "the plane is closed"
        try:
            self._sends.append(_Transfer(self._group.send([tensor], peer, tag), peer))
        except RuntimeError as error:
            raise DataPlaneError(f"sending to rank {peer} failed: {error}", (peer,)) from error

    def _receive(self, tensor: torch.Tensor, peer: int, tag: int) -> _Transfer:
        assert self._group is not None, "the plane is closed"
        try:
            return _Transfer(self._group.recv([tensor], peer, tag), peer)
        except RuntimeError as error:
            raise DataPlaneError(f"receiving from rank {peer} failed: {error}", (peer,)) from error

    def wait(self, transfer: _Transfer) -> None:
        try:
            transfer.work.wait(self._timeout)
        except RuntimeError as error:
            raise DataPlaneError(f"the transfer with rank {transfer.peer} failed: {error}", (transfer.peer,)) from error

    def _finish_sends(self) -> None:
        """Sends of the exchange before this one: long done, but the group wants to be asked."""
        for transfer in self._sends:
            self.wait(transfer)
        self._sends.clear()


@dataclass(frozen=True, slots=True)
class _Arrived:
    rows_MH: torch.Tensor
    counts_S: torch.Tensor
    row_M: torch.Tensor
    weight_M1: torch.Tensor
    received: list[tuple[int, int]]


@dataclass(slots=True)
class _PendingDispatch(Pending[Dispatched[CollectiveHandle]]):
    plane: CollectivePlane
    exchange: Exchange
    sources: list[tuple[_Transfer, torch.Tensor]]
    own_rows: torch.Tensor | None
    num_tokens: int
    token_N: torch.Tensor | None
    sent: list[int]

    def wait(self) -> Dispatched[CollectiveHandle]:
        plane = self.plane
        messages: list[tuple[int, torch.Tensor]] = []
        for transfer, buffer in self.sources:
            plane.wait(transfer)
            messages.append((transfer.peer, buffer))
        if self.own_rows is not None:
            messages.append((plane._shape.rank, self.own_rows))
        if not messages:
            handle = CollectiveHandle(
                self.num_tokens, self.token_N, self.sent, plane._no_rows, plane._no_rows.float().unsqueeze(1), []
            )
            counts_S = torch.zeros(plane._shape.slots_per_rank, dtype=torch.int64)
            return Dispatched(plane._no_tokens, counts_S, 0, handle)
        arrived = plane.arrived(messages, self.exchange)
        handle = CollectiveHandle(
            self.num_tokens, self.token_N, self.sent, arrived.row_M, arrived.weight_M1, arrived.received
        )
        num_tokens = sum(count for _, count in arrived.received)
        return Dispatched(arrived.rows_MH, arrived.counts_S, num_tokens, handle)


@dataclass(slots=True)
class _PendingCombine(Pending[torch.Tensor]):
    plane: CollectivePlane
    handle: CollectiveHandle
    back_NH: torch.Tensor | None
    arrivals: list[tuple[_Transfer, torch.Tensor]]
    own_sum: torch.Tensor | None

    def wait(self) -> torch.Tensor:
        handle = self.handle
        if self.back_NH is None:
            return self.plane._no_tokens
        if self.own_sum is not None:
            self.back_NH[self.plane.own_range(handle.sent)] = self.own_sum
        for transfer, _ in self.arrivals:
            self.plane.wait(transfer)
        assert handle.token_N is not None, "rows come back only for tokens that were sent"
        out_TH = torch.zeros(handle.num_tokens, self.back_NH.shape[1], dtype=torch.float32)
        out_TH.index_add_(0, handle.token_N, self.back_NH.float())
        return out_TH.to(self.back_NH.dtype)
