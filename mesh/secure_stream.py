"""TLS over one connected socket, with those calls of a socket that the links between ranks use.

``ssl.SSLSocket`` takes no flags and hides what it has read from ``poll``. Here the ciphertext goes through memory, so
that the socket stays a plain one: it is polled, has the kernel's time-outs, and any thread may shut it down.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterable
from typing import Any

_SIP_BYTES = 1 << 15
"""Ciphertext that one ``recv`` reads: with a record that was begun before it holds less than ``RECEIVE_BYTES``."""
_GULP_BYTES = 1 << 18
RECEIVE_BYTES = 1 << 16
"""A ``recv`` of so many bytes leaves nothing decrypted behind, of which ``poll`` would not tell."""


class HalfSentError(BlockingIOError):
    """Nothing counts as sent yet, but some of it is on its way: the same has to be sent again."""


class SecureStream:
    """One end of a connection. All calls but ``shutdown`` belong to one thread at a time.

    Args:
        sock: from now on this object's.
        context: whose settings decide which peers will do.
        is_caller: whether this end opened the connection.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_caller: bool) -> None:
        self.raw = sock
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=not is_caller)
        self._is_secure = False
        self._unsent = memoryview(b"")  # ciphertext of a ``send``
        self._num_unsent = 0  # bytes that it stands for

    # -- the handshake ------------------------------------------------------------------------------------------

    def shake(self) -> bool:
        """Go on with the handshake as far as what has arrived allows; whether it is over.

        Raises:
            OSError: the peer's certificate will not do, or the connection failed.
        """
        if self._is_secure:
            return True
        try:
            self._tls.do_handshake()
            self._is_secure = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            with contextlib.suppress(OSError):
                self._flush()  # the alert, which tells the peer why
            raise
        self._flush()
        return self._is_secure

    def peer_certificate(self) -> dict[str, Any]:
        """As ``ssl.SSLSocket.getpeercert``, once the handshake is over."""
        return dict(self._tls.getpeercert() or {})

    # -- as a socket --------------------------------------------------------------------------------------------

    def sendall(self, payload: bytes) -> None:
        """Of a blocking socket."""
        self._tls.write(payload)
        self._flush()

    def send(self, payload: memoryview, flags: int = 0) -> int:
        """Send all of it, of a non-blocking socket; returns the bytes that have gone.

        Raises:
            HalfSentError: some of its ciphertext has to wait. The next call sends the rest and returns what the first
                one was given, whatever it is given itself.
        """
        if not self._unsent:
            self._tls.write(payload)
            self._unsent, self._num_unsent = memoryview(self._leaving.read()), len(payload)
        try:
            while self._unsent:
                self._unsent = self._unsent[self.raw.send(self._unsent, flags) :]
        except BlockingIOError as error:
            raise HalfSentError(*error.args) from None
        return self._num_unsent

    def recv(self, most: int) -> bytes:
        """What has arrived, reading from the socket once at most; b'' = the peer closed.

        Raises:
            BlockingIOError: nothing that can be decrypted yet; also of a blocking socket, and during the handshake.
        """
        data = self._decrypted(most)
        if data is None:
            self.feed(_SIP_BYTES)
            data = self._decrypted(most) if self.shake() else None
        if data is None:
            raise BlockingIOError
        return data

    def recv_into(self, into: memoryview) -> int:
        """As ``socket.recv_into``, once the handshake is over."""
        while (count := self.take(into)) is None:
            self.feed(_GULP_BYTES)
        return count

    def fileno(self) -> int:
        return self.raw.fileno()

    def setblocking(self, flag: bool) -> None:
        self.raw.setblocking(flag)

    def settimeout(self, timeout_s: float | None) -> None:
        self.raw.settimeout(timeout_s)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.raw.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        self.raw.shutdown(how)

    def close(self) -> None:
        self.raw.close()

    # -- in parts, for those who read and write the socket themselves ---------------------------------------------

    def seal(self, parts: Iterable[memoryview]) -> memoryview:
        """The ciphertext of these, which has to be sent before that of later ones."""
        for part in parts:
            if part:
                self._tls.write(part)
        return memoryview(self._leaving.read())

    def feed(self, most: int = _GULP_BYTES, flags: int = 0) -> None:
        """Read ciphertext from the socket once."""
        data = self.raw.recv(most, flags)
        if data:
            self._arrived.write(data)
        else:
            self._arrived.write_eof()

    def take(self, into: memoryview) -> int | None:
        """Decrypt what has been read; None = there is no whole record, 0 = the peer closed."""
        try:
            return int(self._tls.read(len(into), into))
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0

    def _decrypted(self, most: int) -> bytes | None:
        """All that has been read, up to ``most`` bytes."""
        parts: list[bytes] = []
        while self._is_secure and most:
            try:
                part = self._tls.read(most)
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                part = b""
            parts.append(part)
            most -= len(part)
            if not part:
                break
        return b"".join(parts) if parts else None

    def _flush(self) -> None:
        if self._leaving.pending:
            self.raw.sendall(self._leaving.read())


Stream = socket.socket | SecureStream
"""A link's connection: in the clear or not."""
