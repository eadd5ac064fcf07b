"""Follows the number of servers that there should be, for a launcher without an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.client_key import key_interceptors
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

log = logging.getLogger(__name__)

RETRY_S = 0.5
_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
STOP_TIMEOUT_S = 5.0


class ScaleWatch:
    """A thread with one stream from the balancer; a balancer that dies is called again, or another one is.

    Args:
        addresses: of the balancers, ``HOST:PORT,HOST:PORT``; asked at every call.
        launcher: who watches, as `expertmesh balancer status` shows it.
        on_scale: called on the thread with the scale at the start and after each change; it must not block.
        api_key: of scope `read`, where the balancer asks for keys and not for an operator's certificate.
    """

    def __init__(
        self,
        addresses: Callable[[], str],
        tls: TlsConfig,
        launcher: str,
        on_scale: Callable[[admin_pb2.Scale], None],
        api_key: str | None = None,
    ) -> None:
        self._addresses = addresses
        self._tls = tls
        self._launcher = launcher
        self._on_scale = on_scale
        self._api_key = api_key
        self._told_refusal = False
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="scale-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is called after this."""
        if self._thread.ident is None:
            self._loop.close()
            return
        with contextlib.suppress(RuntimeError):  # the thread has ended already
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._follow_until_stopped())
        finally:
            self._loop.close()

    async def _follow_until_stopped(self) -> None:
        following = asyncio.create_task(self._follow(), name="follow-scale")
        stopping = asyncio.create_task(self._stopped.wait(), name="stop-watch")
        try:
            done, _ = await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
            if following in done:
                following.result()
        finally:
            for task in (following, stopping):
                task.cancel()
            await asyncio.gather(following, stopping, return_exceptions=True)
            await rpc.calls_over()

    async def _follow(self) -> None:
        while True:
            for address in split_addresses(self._addresses()):
                async with rpc.open_channel(
                    address, self._tls, role="balancer", interceptors=key_interceptors(self._api_key)
                ) as channel:
                    try:
                        await self._follow_one(admin_pb2_grpc.AdminServiceStub(channel))
                    except grpc.aio.AioRpcError as error:  # dead, or not the one that leads
                        self._tell_refusal(error)
            await asyncio.sleep(RETRY_S)

    def _tell_refusal(self, error: grpc.aio.AioRpcError) -> None:
        """Once: servers are not started when the scale asks for more of them."""
        if error.code() in _REFUSALS and not self._told_refusal:
            self._told_refusal = True
            log.warning("the scale cannot be watched: %s: %s", error.code().name, error.details())

    async def _follow_one(self, stub: admin_pb2_grpc.AdminServiceStub) -> None:
        async for response in stub.WatchScale(admin_pb2.WatchScaleRequest(launcher=self._launcher)):
            self._on_scale(response.scale)
