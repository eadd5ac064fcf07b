"""HTTP/1.1 for callers who are not trusted: bounds on the size of headers and on the time of a request's arrival."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

ABORT_KEY = "expertmesh.abort"
"""In an ASGI scope: a function that drops the connection with what it has not sent yet."""
CERTIFICATE_KEY = "expertmesh.certificate"
"""In an ASGI scope: the caller's verified certificate as ``ssl`` describes it, or None."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which has neither bound.

    Args:
        max_header_bytes: of the request line and all headers; beyond it the answer is 431.
        receive_timeout_s: from the first byte of a request, or from the opening of the connection, to its last byte;
            then the connection is closed.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        max_header_bytes: int,
        receive_timeout_s: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._max_header_bytes = max_header_bytes
        self._receive_timeout_s = receive_timeout_s
        self._head_bytes = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            # The parser keeps an unfinished header in memory, however long it gets.
            self._head_bytes += len(data)
            if self._head_bytes > self._max_header_bytes:
                self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT_KEY] = self.transport.abort  # type: ignore[literal-required]  # an extension of ours
        self.scope[CERTIFICATE_KEY] = self.transport.get_extra_info("peercert")  # type: ignore[literal-required]
        self._in_head, self._head_bytes = True, 0
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.transport.is_closing():
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._max_header_bytes:
            self._refuse_headers()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # an answer that nobody reads would keep a closing connection open
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self._receive_timeout_s, self._on_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_late(self) -> None:
        if self.pipeline:  # it waits for the answer before it, unread: no fault of the client's
            self._start_timer()
            return
        self._timer = None
        self.transport.abort()

    def _refuse_headers(self) -> None:
        text = f"The request line and the headers have more than {self._max_header_bytes} bytes."
        head = f"content-type: text/plain\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n{text}"
        self.transport.write(STATUS_LINE[431] + head.encode())
        self.transport.close()


def bounded_protocol(max_header_bytes: int, receive_timeout_s: float) -> Any:
    """For ``uvicorn.Config(http=...)``."""
    return functools.partial(BoundedProtocol, max_header_bytes=max_header_bytes, receive_timeout_s=receive_timeout_s)
