"""A server interceptor before every handler: who calls, whether they may, and a time-out for their first message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from expertmesh.mesh.gate import ANYBODY, Denied, Gate, Principal

RETRY_AFTER_KEY = "retry-after-ms"

FIRST_MESSAGE_TIMEOUT_S = 10.0
"""Of servers without a gate."""

_principal: ContextVar[Principal] = ContextVar("principal", default=ANYBODY)

Context = grpc.aio.ServicerContext[Any, Any]


def principal() -> Principal:
    """Who made the call that this task answers."""
    return _principal.get()


class Door(grpc.aio.ServerInterceptor):
    """Asks the gate before a byte of the request is read, and waits for the first message no longer than it may take.

    It stands outside of ``ExceptionGuard``, whose handlers are all coroutine functions. To gRPC every handler takes a
    stream: so one that wants a single message is not left waiting for it for ever.
    """

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._timeout_s = gate.first_message_timeout_s if gate is not None else FIRST_MESSAGE_TIMEOUT_S

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        wrapped = self._checked(handler_call_details.method, handler)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _checked(self, method: str, handler: Any) -> Any:
        inner = next(
            filter(None, (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream))
        )

        async def checked(requests: AsyncIterator[Any], context: Context) -> Any:
            try:
                return await self._answer(method, handler, inner, requests, context)
            except grpc.aio.AbortError as error:
                # gRPC keeps it with the call, and the frames that it came through keep the call: with them it would be
                # the garbage collector that frees the request.
                error.__context__ = None
                raise error.with_traceback(None) from None
            finally:
                del requests, context

        return checked

    async def _answer(
        self, method: str, handler: Any, inner: Any, requests: AsyncIterator[Any], context: Context
    ) -> Any:
        gate = self._gate
        if gate is None:
            return await inner(await self._input(handler, requests, context), context)
        caller, rule = ANYBODY, None
        try:
            caller, rule = gate.admit_rpc(method, context)
            _principal.set(caller)
            request = await self._input(handler, requests, context)
            if rule.writes:
                return await _audited(gate, caller, method, inner, request, context)
            return await inner(request, context)
        except Denied as denied:
            if rule is not None:  # the handler found it; the gate has written its own down
                gate.audit.denied(caller.who, method, denied.code.name, denied.message)
            await abort(context, denied)

    async def _input(self, handler: Any, requests: AsyncIterator[Any], context: Context) -> Any:
        if handler.request_streaming:
            return requests  # its handler has a time-out of its own
        return await _first(self._timeout_s, context)


async def _audited(gate: Gate, caller: Principal, method: str, inner: Any, request: Any, context: Context) -> Any:
    outcome = "CANCELLED"
    try:
        response = await inner(request, context)
        outcome = "OK"
        return response
    except grpc.aio.AbortError:
        code = context.code()
        outcome = code.name if isinstance(code, grpc.StatusCode) else str(code)
        raise
    finally:
        gate.audit.did(caller.who, method, outcome, request)


async def abort(context: Context, denied: Denied) -> None:
    """End the call with the refusal."""
    trailing = ((RETRY_AFTER_KEY, str(denied.retry_after_ms)),) if denied.retry_after_ms is not None else ()
    await context.abort(denied.code, denied.message, trailing)


async def _first(timeout_s: float, context: Context) -> Any:
    """The one message of a call. Not from the iterator of its messages: that and the call, once it is begun and not
    read to its end, keep each other for the garbage collector."""
    try:
        async with asyncio.timeout(timeout_s):
            message = await context.read()
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, _too_late(timeout_s))
    except DecodeError as error:
        text = f"the request's bytes are no valid message ({error}); send protobuf with UTF-8 strings"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    if message is grpc.aio.EOF:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a message: send one")
    return message


def _too_late(timeout_s: float) -> str:
    return f"no message within {timeout_s:g} s of the call's start: send it at once (api.first_message_timeout_s)"
