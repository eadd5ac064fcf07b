"""Point-to-point transfers over one TCP link a pair of ranks, read and written by the step thread itself.

Against gloo, whose every message passes through an event-loop thread of its own, this saves thread switches: about half
of the CPU time and a quarter of the wall time of a dispatch and combine (8 tokens a rank, five processes, two cores:
``python benchmarks/dataplane.py``, benchmarks/results/dataplane.json).
The links are those that the ranks of a view opened and authenticated when they met.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from expertmesh.mesh.errors import DataPlaneError

_HEAD = struct.Struct("<IQ")  # tag, bytes of the payload
_SECONDS = struct.Struct("ll")  # struct timeval


@dataclass(slots=True)
class Peer:
    rank: int
    sock: socket.socket
    unsent: deque[memoryview] = field(default_factory=deque)
    posted: int = 0  # bytes of all messages to it, gone or not

    @property
    def gone(self) -> int:
        """Bytes that the kernel has taken."""
        return self.posted - sum([len(part) for part in self.unsent])


class SocketGroup:
    """Implements ``PointToPoint``. Transfers of a pair complete in the order in which both sides post them.

    All methods belong to the step thread. Nothing runs in the background: what a send could not hand to the kernel at
    once goes out while a later receive waits, so that two ranks that send to each other never block each other.
    """

    def __init__(self, links: Mapping[int, socket.socket], *, timeout_s: float) -> None:
        self._peers = {rank: Peer(rank, sock) for rank, sock in links.items()}
        self._backlog: set[int] = set()  # ranks with something unsent
        self._timeout_s = timeout_s
        seconds, fraction = divmod(timeout_s, 1.0)
        for sock in links.values():
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The kernel's own time-out: a receive that finds its message costs one system call.
            timeval = _SECONDS.pack(int(seconds), max(int(fraction * 1e6), 0 if seconds else 1))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> _Sent:
        """Start to send one contiguous tensor; its memory must hold still until the next exchange."""
        peer = self._peers[dst]
        payload = _bytes_of(tensors[0])
        parts = self._parts(peer, [memoryview(_HEAD.pack(tag, len(payload))), payload])
        peer.posted += sum([len(part) for part in parts])
        if not peer.unsent:
            parts = _write(peer, parts)
        if parts:
            peer.unsent.extend(parts)
            self._backlog.add(peer.rank)
        return _Sent(self, peer, peer.posted)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> _Received:
        """Expect a message of at most the tensor's size; a shorter one fills its beginning."""
        return _Received(self, self._peers[src], _bytes_of(tensors[0]), tag)

    def receive(self, peer: Peer, into: memoryview, tag: int) -> None:
        head = bytearray(_HEAD.size)
        self._read(peer, memoryview(head))
        got_tag, size = _HEAD.unpack(head)
        if got_tag != tag or size > len(into):
            raise DataPlaneError(
                f"rank {peer.rank} sent {size} bytes tagged {got_tag}, expected at most {len(into)} tagged {tag}",
                (peer.rank,),
            )
        if size:
            self._read(peer, into[:size])

    def flush(self, peer: Peer, end: int) -> None:
        """Wait until the kernel has taken so many bytes for a peer, and not for what was posted behind them: the peer
        may read that only when this rank has gone on."""
        deadline = time.monotonic() + self._timeout_s
        while peer.gone < end:
            self._progress(None, deadline)

    def _parts(self, peer: Peer, parts: list[memoryview]) -> list[memoryview]:
        """What goes to the kernel for these."""
        return parts

    def _read(self, peer: Peer, into: memoryview) -> None:
        deadline = time.monotonic() + self._timeout_s
        while into:
            flags = socket.MSG_WAITALL
            if self._backlog:
                self._progress(peer, deadline)
                flags = socket.MSG_DONTWAIT
            try:
                count = peer.sock.recv_into(into, len(into), flags)
            except BlockingIOError:
                if flags == socket.MSG_WAITALL or time.monotonic() > deadline:
                    raise silent(peer, self._timeout_s) from None
                continue
            except OSError as error:
                raise failed(peer, error) from error
            if count == 0:
                raise DataPlaneError(f"rank {peer.rank} closed its link", (peer.rank,))
            into = into[count:]

    def _progress(self, reader: Peer | None, deadline: float) -> None:
        """Wait until ``reader`` has something to read or some send can go on; let those go on."""
        poller = select.poll()
        waiting = {peer.sock.fileno(): peer for peer in self._peers.values() if peer.unsent}
        for number in waiting:
            poller.register(number, select.POLLOUT)
        if reader is not None:
            mask = select.POLLIN | (select.POLLOUT if reader.unsent else 0)
            poller.register(reader.sock.fileno(), mask)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise silent(reader or next(iter(waiting.values())), self._timeout_s)
        for number, event in poller.poll(1e3 * left_s):
            peer = waiting.get(number)
            if peer is not None and event & ~select.POLLIN:
                parts = list(peer.unsent)
                peer.unsent = deque(_write(peer, parts))
                if not peer.unsent:
                    self._backlog.discard(peer.rank)


@dataclass(frozen=True, slots=True)
class _Sent:
    group: SocketGroup
    peer: Peer
    end: int

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.peer.unsent:
            self.group.flush(self.peer, self.end)
        return True


@dataclass(frozen=True, slots=True)
class _Received:
    group: SocketGroup
    peer: Peer
    into: memoryview
    tag: int

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.group.receive(self.peer, self.into, self.tag)
        return True


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    assert tensor.is_contiguous(), "only contiguous tensors are transferred"
    if not tensor.numel():
        return memoryview(b"")
    if tensor.dtype == torch.bfloat16:  # NumPy has none
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


def _write(peer: Peer, parts: list[memoryview]) -> list[memoryview]:
    """Hand to the kernel what it takes without waiting; returns the rest."""
    try:
        count = peer.sock.sendmsg(parts, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return parts
    except OSError as error:
        raise failed(peer, error) from error
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = parts[0][count:]
    return parts


def failed(peer: Peer, error: OSError) -> DataPlaneError:
    return DataPlaneError(f"the link to rank {peer.rank} failed: {error}", (peer.rank,))


def silent(peer: Peer, timeout_s: float) -> DataPlaneError:
    return DataPlaneError(f"rank {peer.rank} was silent for {timeout_s:g} s in the middle of a step", (peer.rank,))
