"""HTTP/2 as no client library would speak it."""

from __future__ import annotations

import contextlib
import struct
import time

from support.secure_server import TIMEOUT_S, raw_connection


class Http2:
    """Frames by hand, headers without compression."""

    DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
    _END_HEADERS, _END_STREAM, _ACK = 4, 1, 1

    def __init__(self, address: str) -> None:
        self._socket = raw_connection(address)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._frame(self.SETTINGS, 0, 0, b""))
        self._buffer = b""

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def request(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """A unary gRPC call with one empty message."""
        usual = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        ]
        block = b"".join(b"\x00" + self._text(name) + self._text(value) for name, value in [*usual, *headers])
        message = self._frame(self.DATA, self._END_STREAM, 1, bytes(5))
        self._socket.sendall(self._frame(self.HEADERS, self._END_HEADERS, 1, block) + message)

    def ping_until_refused(self) -> None:
        """As fast as they are answered, until the server says GOAWAY or closes the connection.

        Raises:
            TimeoutError: it goes on answering.
        """
        ended_s = time.monotonic() + TIMEOUT_S
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < ended_s:
                self._socket.sendall(self._frame(self.PING, 0, 0, bytes(8)))
                kind, flags = self.SETTINGS, 0
                while kind != self.PING or not flags & self._ACK:
                    kind, flags, _ = self._read()
                    if kind == self.GOAWAY:
                        return
            raise TimeoutError("pings are answered without end")

    def frames_until_end(self) -> set[int]:
        """Kinds of the frames up to the end of stream 1 or of the connection."""
        kinds = set[int]()
        try:
            while True:
                kind, flags, stream = self._read()
                kinds.add(kind)
                if kind == self.GOAWAY or (stream == 1 and (kind == self.RESET or flags & self._END_STREAM)):
                    return kinds
        except ConnectionError:
            return kinds | {self.RESET}

    def _read(self) -> tuple[int, int, int]:
        head = self._exactly(9)
        size = int.from_bytes(head[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        self._exactly(size)
        return kind, flags, stream

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionAbortedError("closed")
            self._buffer += data
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload

    @staticmethod
    def _text(data: bytes) -> bytes:
        assert len(data) < 127
        return bytes([len(data)]) + data
