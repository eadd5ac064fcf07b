"""An ASGI application on a port of this process, in the event loop that runs. Imported only where one is served."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.http_protocol import bounded_protocol
from expertmesh.mesh.rpc import join_host_port

START_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 30
BACKLOG = 1024
MAX_HEADER_BYTES = 32 * 2**10
RECEIVE_TIMEOUT_S = 20.0
MAX_CONNECTIONS = 1024
"""Beyond it requests are answered with 503."""
_DATE_INTERVAL_S = 1.0


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        """uvicorn's own looks ten times a second whether it should stop."""
        while not await self.on_tick(0):  # which writes the date that answers carry
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DATE_INTERVAL_S):
                    await self.stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own waits for connections, though there be none."""
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, not to one of its ports."""
        yield


class HttpServer:
    """Serves ``app`` from ``start`` to ``stop``.

    Args:
        key: of the configuration, named when the port cannot be had.
        share_port: others of this user may listen at it too, and get a part of the connections.
        tls: made from the configuration's certificates; None = plain HTTP.
        grace_s: how long answers that have begun may take to end at ``stop``.
        settings: further ones of ``uvicorn.Config``, before those that are made here: the bounds above.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int,
        key: str,
        share_port: bool = False,
        tls: ssl.SSLContext | None = None,
        grace_s: float = 5.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        host = host.strip("[]")
        self._listening = _bind(host, port, key, share_port)
        self.address = join_host_port(host, int(self._listening.getsockname()[1]))
        """``host:port`` with the port that was given or found."""
        defaults = {
            "http": bounded_protocol(MAX_HEADER_BYTES, RECEIVE_TIMEOUT_S),
            "limit_concurrency": MAX_CONNECTIONS,
            "log_config": None,
            "access_log": False,
            "lifespan": "off",
            "ws": "none",
            "server_header": False,
            "date_header": True,
            "proxy_headers": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "timeout_graceful_shutdown": max(1, round(grace_s)),
            "backlog": BACKLOG,
        }
        config = uvicorn.Config(app, **{**defaults, **(settings or {})})
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._stop_timeout_s = 2 * grace_s + 1.0

    async def start(self) -> None:
        """Until it answers.

        Raises:
            TimeoutError: it does not within ``START_TIMEOUT_S``.
        """
        self._task = asyncio.create_task(self._server.serve([self._listening]), name=f"http-{self.address}")
        async with asyncio.timeout(START_TIMEOUT_S):
            while not self._server.started:
                done, _ = await asyncio.wait({self._task}, timeout=0.005)
                if done:
                    await self._task
                    raise RuntimeError(f"the HTTP server on {self.address} ended before it began")

    def stop_listening(self) -> None:
        """Take no further connections; those that there are go on."""
        for server in self._server.servers:
            server.close()

    async def stop(self) -> None:
        """Accept nothing more, let answers end, close."""
        if self._task is None:
            self._listening.close()
            return
        self._server.should_exit = True
        self._server.stopping.set()
        done, _ = await asyncio.wait({self._task}, timeout=self._stop_timeout_s)
        if not done:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _bind(host: str, port: int, key: str, share: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(key, f"{host}:{port} cannot be listened on: {error}", "choose another port or host") from None
    listening.setblocking(False)
    return listening
