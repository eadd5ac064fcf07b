"""What every gRPC service of a router does with bytes and with refusals."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from expertmesh.mesh.rpc_door import RETRY_AFTER_KEY, principal
from expertmesh.router.calls import Call
from expertmesh.router.errors import Refusal

log = logging.getLogger(__name__)

MessageT = TypeVar("MessageT", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message of the expected type: a string that is not UTF-8, a truncated field."""

    problem: str


def reader(message_type: type[MessageT]) -> Callable[[bytes], MessageT | Malformed]:
    """Parse, or say why not: an exception here would reach the client as a bare INTERNAL."""

    def read(data: bytes) -> MessageT | Malformed:
        try:
            return message_type.FromString(data)
        except DecodeError as error:
            return Malformed(str(error))

    return read


def write(message: Message) -> bytes:
    return message.SerializeToString()


def well_formed(request: MessageT | Malformed) -> MessageT:
    """
    Raises:
        Refusal: it is not.
    """
    if isinstance(request, Malformed):
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"request: its bytes are no valid message ({request.problem}); send protobuf with UTF-8 strings",
        )
    return request


def call_of(context: Context) -> Call:
    remaining_s = context.time_remaining()
    deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
    return Call(metadata=context.invocation_metadata(), deadline_s=deadline_s, principal=principal())


@contextlib.asynccontextmanager
async def answering(context: Context) -> AsyncIterator[None]:
    """Refusals become the call's status; a client that is gone gets none."""
    try:
        try:
            yield
        except Refusal as refusal:
            trailing: tuple[tuple[str, str], ...] = ()
            if refusal.retry_after_ms is not None:
                trailing = ((RETRY_AFTER_KEY, str(refusal.retry_after_ms)),)
            # To a client that reads nothing this takes until it reads, or goes; the request itself is over.
            await context.abort(refusal.code, refusal.message, trailing)
    except grpc.aio.InternalError as error:  # a write to a client that went away in this moment
        log.debug("%s is gone: %s", context.peer(), error)
        raise grpc.aio.AbortError from error
