"""Framed TCP links between ranks, and a way to end a wait from another thread."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from expertmesh.mesh.errors import DataPlaneError
from expertmesh.mesh.secure_stream import RECEIVE_BYTES, Stream

_HEADER_BYTES = 4
MAX_MESSAGE_BYTES = 1 << 20


class Link:
    """One framed TCP link to a peer rank: a 4-byte little-endian length, then a protobuf message."""

    def __init__(self, sock: Stream, rank: int, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.rank = rank
        self.max_message_bytes = max_message_bytes
        self._buffer = bytearray()

    def send(self, payload: bytes) -> None:
        try:
            self.sock.sendall(len(payload).to_bytes(_HEADER_BYTES, "little") + payload)
        except OSError as error:
            raise DataPlaneError(f"the link to rank {self.rank} failed: {error}", (self.rank,)) from error

    def receive(self) -> Iterator[bytes]:
        """Read what has arrived (once) and yield every whole message in it."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:  # the beginning of what TLS can make out as a whole only
            return
        except OSError as error:
            raise DataPlaneError(f"the link to rank {self.rank} failed: {error}", (self.rank,)) from error
        if not data:
            raise DataPlaneError(f"rank {self.rank} closed its link", (self.rank,))
        self._buffer += data
        yield from self.buffered()

    def buffered(self) -> Iterator[bytes]:
        """The whole messages that were read but not taken yet."""
        while len(self._buffer) >= _HEADER_BYTES:
            size = int.from_bytes(self._buffer[:_HEADER_BYTES], "little")
            if size > self.max_message_bytes:
                raise DataPlaneError(f"rank {self.rank} sent a message of {size} bytes", (self.rank,))
            if len(self._buffer) < _HEADER_BYTES + size:
                return
            payload = bytes(self._buffer[_HEADER_BYTES : _HEADER_BYTES + size])
            del self._buffer[: _HEADER_BYTES + size]
            yield payload

    def close(self) -> None:
        self.sock.close()


class Waker:
    """Lets any thread end the step thread's wait. Made once per process, it outlives the views."""

    def __init__(self) -> None:
        self._receive, self._send = socket.socketpair()
        self._receive.setblocking(False)
        self._send.setblocking(False)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # unread wake-ups fill the pipe: the reader will wake
            self._send.send(b"w")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._receive.recv(4096):
                pass

    def fileno(self) -> int:
        return self._receive.fileno()

    def close(self) -> None:
        self._receive.close()
        self._send.close()
