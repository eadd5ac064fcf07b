"""One link of a side group: messages between two expert ranks, weights among them, on a stream that stays whole.

ASK for a transfer, and it is answered by GIVE, which its weights follow, or REFUSE. ASK_TO_READ, and the answer may be
OFFER too, which a ticket follows that says where the weights can be read; DONE says that nobody reads there any more.

A message that has begun is sent to its end, and read to its end, whatever has become of it: what nobody wants any more
is read into nothing.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expertmesh.mesh.secure_stream import HalfSentError, Stream

ASK, GIVE, REFUSE, ASK_TO_READ, OFFER, DONE = range(1, 7)
_HEAD = struct.Struct("<BQIIQ")
_SCRAP_BYTES = 1 << 16
MAX_TICKET_BYTES = 1 << 20


class Head(NamedTuple):
    """How a message begins; ``num_bytes`` of weights, or of a ticket, follow it."""

    kind: int
    plan: int
    number: int
    checksum: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class _Outgoing:
    head: Head
    parts: deque[memoryview]  # what has not been sent
    is_begun: bool = False


class SideLink:
    """Never blocks. ``broken`` says why the link is of no use any more; it is closed then, and moves nothing.

    ``index``: of the peer, among the expert ranks.
    """

    def __init__(self, index: int, sock: Stream) -> None:
        sock.setblocking(False)
        self.index = index
        self.sock = sock
        self.broken = ""
        self._outgoing: deque[_Outgoing] = deque()
        self._head = bytearray()
        self._arriving: Head | None = None
        self._into: deque[memoryview] = deque()
        self._num_scrap = 0

    @property
    def has_more(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outgoing)

    @property
    def next_is_weights(self) -> bool:
        """Whether what is sent next are weights or the leave to read some, which may have to wait for their turn."""
        if not self._outgoing:
            return False
        message = self._outgoing[0]
        return message.head.kind == OFFER or (message.is_begun and message.head.num_bytes > 0)

    def post(self, head: Head, weights: Sequence[memoryview] = ()) -> None:
        """Send this behind what waits already. The memory, of weights or a ticket, holds still until it has gone."""
        if not self.broken:
            self._outgoing.append(_Outgoing(head, deque([memoryview(_HEAD.pack(*head)), *weights])))

    def withdraw(self) -> list[Head]:
        """Take back the weights that have not begun to go; returns their heads."""
        back = [message.head for message in self._outgoing if message.head.num_bytes and not message.is_begun]
        self._outgoing = deque(m for m in self._outgoing if m.is_begun or not m.head.num_bytes)
        return back

    def write(self, most_bytes: int) -> tuple[int, Head | None]:
        """Hand one piece of one message, of at most so many bytes, to the kernel.

        Returns the bytes that it took, and the head of a message that has gone as a whole by it.
        """
        if self.broken or not self._outgoing:
            return 0, None
        message = self._outgoing[0]
        try:
            count = self.sock.send(message.parts[0][:most_bytes], socket.MSG_NOSIGNAL)
        except HalfSentError:
            message.is_begun = True
            return 0, None
        except BlockingIOError:
            return 0, None
        except OSError as error:
            self._break(str(error))
            return 0, None
        message.is_begun = True
        message.parts[0] = message.parts[0][count:]
        if not message.parts[0]:
            message.parts.popleft()
        if message.parts:
            return count, None
        self._outgoing.popleft()
        return count, message.head

    def read(self, place: Callable[[Head], Sequence[memoryview]]) -> Iterator[Head]:
        """Read what is there, and yield each message that has come as a whole.

        Args:
            place: where the weights of this message go; nowhere = they are read and dropped.
        """
        while not self.broken and self._read_some():
            if self._arriving is None and len(self._head) == _HEAD.size:
                self._arriving = Head(*_HEAD.unpack(self._head))
                self._into.extend(place(self._arriving))
                self._num_scrap = self._arriving.num_bytes - sum(len(part) for part in self._into)
                self._head.clear()
            if self._arriving is not None and not self._into and not self._num_scrap:
                whole, self._arriving = self._arriving, None
                yield whole

    def scrap(self, plan: int, number: int) -> None:
        """Nobody wants this transfer any more: if it is in the middle of arriving, its memory is let go."""
        if self._arriving is not None and (self._arriving.plan, self._arriving.number) == (plan, number):
            self._num_scrap += sum(len(part) for part in self._into)
            self._into.clear()

    def close(self) -> None:
        self._break("it is closed")

    def _read_some(self) -> bool:
        """False when nothing is there, for now or for ever."""
        try:
            if self._into:
                count = self.sock.recv_into(self._into[0])
                self._into[0] = self._into[0][count:]
                if not self._into[0]:
                    self._into.popleft()
            elif self._num_scrap:
                count = len(self.sock.recv(min(self._num_scrap, _SCRAP_BYTES)))
                self._num_scrap -= count
            else:
                data = self.sock.recv(_HEAD.size - len(self._head))
                self._head += data
                count = len(data)
        except BlockingIOError:
            return False
        except OSError as error:
            self._break(str(error))
            return False
        if not count:
            self._break("it closed the link")
        return bool(count)

    def _break(self, reason: str) -> None:
        self.broken = self.broken or reason
        self._outgoing.clear()
        self._into.clear()
        self.sock.close()
