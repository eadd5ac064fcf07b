"""``grpc.health.v1`` that plain code on the event loop can set, and whose watchers end with the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "grpc.health.v1.Health"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio-health-checking has no type information
    """One status for the whole server ('') and each of ``services``; NOT_SERVING until told otherwise.

    Differs from grpcio-health-checking's servicer in two points: setting a status needs no ``await``, and ``close``
    ends the watchers, which would otherwise keep a graceful stop waiting for its whole grace period.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._services = ("", *services)
        self._status = _NOT_SERVING
        self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Call on the event loop's thread. Ignored after ``close``."""
        if not self._closed:
            self._announce(_SERVING if serving else _NOT_SERVING)

    def close(self) -> None:
        """NOT_SERVING for good; watchers get it and end."""
        self._closed = True
        self._announce(_NOT_SERVING)

    def _announce(self, status: int) -> None:
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        response = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, response))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        sent = None
        while True:
            # Read together: a close during the write below must get another turn of the loop.
            changed, closed = self._changed, self._closed
            status = self._status if request.service in self._services else _UNKNOWN
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            if closed:
                return
            await changed.wait()
