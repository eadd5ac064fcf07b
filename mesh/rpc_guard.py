"""A server interceptor: what a handler did not foresee ends in INTERNAL and one log record, never in a bare UNKNOWN."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from expertmesh.mesh.gate import Denied

if TYPE_CHECKING:
    from expertmesh.mesh.telemetry import Telemetry

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

log = logging.getLogger(__name__)


class ExceptionGuard(grpc.aio.ServerInterceptor):
    """Statuses set by ``context.abort``, denials and cancellations pass through untouched."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._errors = telemetry.metrics.rpc_internal_errors

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[RequestT, ResponseT] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[RequestT, ResponseT] | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        method = handler_call_details.method
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            guard = self._stream if inspect.isasyncgenfunction(inner) else self._call
            wrapped = guard(method, inner)
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            wrapped = self._call(method, handler.stream_unary if handler.request_streaming else handler.unary_unary)
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _call(self, method: str, inner: Any) -> Any:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await inner(request, context)
            except (grpc.aio.AbortError, asyncio.CancelledError, Denied):
                raise
            except Exception as error:  # noqa: BLE001  # the last line of defence of every handler
                await self._abort(method, context, error)

        return guarded

    def _stream(self, method: str, inner: Any) -> Any:
        # A coroutine that writes, not a generator: gRPC leaves the generator of a cancelled call to the garbage
        # collector, so that its ``finally`` runs at any later time, and on a context whose call is gone (a segfault).
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            try:
                async with contextlib.aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            except (grpc.aio.AbortError, asyncio.CancelledError, Denied):
                raise
            except Exception as error:  # noqa: BLE001  # the last line of defence of every handler
                await self._abort(method, context, error)

        return guarded

    async def _abort(self, method: str, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        log.error("%s failed for %s", method, context.peer(), exc_info=error)
        self._errors.add(1, method=method)
        if context.cancelled() or context.done():
            return  # nobody is left to be told, and aborting a call that is over can crash grpcio 1.85
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: the server's log has the details")
