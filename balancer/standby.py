"""The balancer's services while it may not act: every call is refused, with the leader's address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

LEADER_KEY = "expertmesh-leader"
"""Of the trailing metadata: where the balancer is that leads, if that is known."""


class NotLeadingError(Exception):
    """This balancer stands by; the text says who leads."""


class Switchboard(grpc.GenericRpcHandler):
    """Looks every call's handler up at the moment of the call.

    The servicers of whoever may act are added to it as to a server (``add_..._to_server(servicer, switchboard)``).

    Args:
        services: full names of the services that calls are refused of.
        refusal: why, and the address that the trailer names ('' = unknown).
    """

    def __init__(self, services: Sequence[str], refusal: Callable[[], tuple[str, str]]) -> None:
        self._services = frozenset(services)
        self._refusal = refusal
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._holds: Callable[[], bool] = lambda: False

    def open(self, holds: Callable[[], bool]) -> None:
        """From now on calls are answered by what was added, for as long as ``holds`` says so."""
        self._holds = holds

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """What generated code calls beside the method above, for servers that look calls up by their name."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method.rpartition("/")[0].removeprefix("/") not in self._services:
            return None
        if not self._holds():
            # Of any kind of call: a handler that only aborts reads nothing and writes nothing.
            return grpc.stream_stream_rpc_method_handler(self._refuse)
        found = (handler.service(handler_call_details) for handler in self._handlers)
        return next((handler for handler in found if handler is not None), None)

    async def _refuse(self, requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        reason, leader = self._refusal()
        trailer = ((LEADER_KEY, leader),) if leader else ()
        # After a process stood still, many who called have long gone.
        with contextlib.suppress(grpc.aio.InternalError):
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason, trailer)
