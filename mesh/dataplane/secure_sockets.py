"""``SocketGroup`` over TLS: the step thread encrypts what it sends and decrypts what it reads."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

from expertmesh.mesh.dataplane.sockets import Peer, SocketGroup, failed, silent
from expertmesh.mesh.errors import DataPlaneError
from expertmesh.mesh.secure_stream import SecureStream


class SecureGroup(SocketGroup):
    """Implements ``PointToPoint``, as ``SocketGroup`` does."""

    def __init__(self, links: Mapping[int, SecureStream], *, timeout_s: float) -> None:
        super().__init__({rank: stream.raw for rank, stream in links.items()}, timeout_s=timeout_s)
        self._streams = dict(links)

    def _parts(self, peer: Peer, parts: list[memoryview]) -> list[memoryview]:
        try:
            return [self._streams[peer.rank].seal(parts)]
        except OSError as error:
            raise failed(peer, error) from error

    def _read(self, peer: Peer, into: memoryview) -> None:
        stream, deadline = self._streams[peer.rank], time.monotonic() + self._timeout_s
        while into:
            flags = 0
            try:
                count = stream.take(into)
                if count is None:
                    if self._backlog:
                        self._progress(peer, deadline)
                        flags = socket.MSG_DONTWAIT
                    stream.feed(flags=flags)
                    continue
            except BlockingIOError:
                if not flags or time.monotonic() > deadline:
                    raise silent(peer, self._timeout_s) from None
                continue
            except OSError as error:
                raise failed(peer, error) from error
            if count == 0:
                raise DataPlaneError(f"rank {peer.rank} closed its link", (peer.rank,))
            into = into[count:]
