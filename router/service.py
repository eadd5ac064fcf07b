"""``GenerationService``: gRPC in, gRPC out; the work is the runner's."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from expertmesh.mesh.rpc_door import RETRY_AFTER_KEY, principal
from expertmesh.router.calls import Calls
from expertmesh.router.errors import Refusal
from expertmesh.v1 import generate_pb2

log = logging.getLogger(__name__)

SERVICE_NAME = "expertmesh.v1.GenerationService"

MessageT = TypeVar("MessageT", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message of the expected type: a string that is not UTF-8, a truncated field."""

    problem: str


class GenerationService:
    """The request API of one router."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the service to a server; returns its full name."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Generate": stream(self.generate, _reader(generate_pb2.GenerateRequest), _write),
            "GenerateUnary": unary(self.generate_unary, _reader(generate_pb2.GenerateRequest), _write),
            "Abort": unary(self.abort, _reader(generate_pb2.AbortRequest), _write),
            "GetModelInfo": unary(self.get_model_info, _reader(generate_pb2.GetModelInfoRequest), _write),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        return (SERVICE_NAME,)

    async def generate(self, request: generate_pb2.GenerateRequest | Malformed, context: Context) -> None:
        async with self._answering(context):
            await self._run(_well_formed(request), context, context.write)

    async def generate_unary(
        self, request: generate_pb2.GenerateRequest | Malformed, context: Context
    ) -> generate_pb2.GenerateUnaryResponse:
        whole = generate_pb2.GenerateUnaryResponse()
        texts: list[str] = []

        async def collect(response: generate_pb2.GenerateResponse) -> None:
            texts.append(response.text)
            whole.request_id = response.request_id
            whole.token_ids.extend(response.token_ids)
            whole.logprobs.extend(response.logprobs)
            if response.HasField("finish"):
                whole.finish.CopyFrom(response.finish)

        async with self._answering(context):
            await self._run(_well_formed(request), context, collect)
        whole.text = "".join(texts)
        return whole

    async def abort(
        self, request: generate_pb2.AbortRequest | Malformed, context: Context
    ) -> generate_pb2.AbortResponse:
        async with self._answering(context):
            found = self._calls.runner.cancel(_well_formed(request).request_id, principal())
            return generate_pb2.AbortResponse(found=found)

    async def get_model_info(
        self, request: generate_pb2.GetModelInfoRequest | Malformed, context: Context
    ) -> generate_pb2.GetModelInfoResponse:
        async with self._answering(context):
            _well_formed(request)
            return self._calls.model.info()

    async def _run(self, request: generate_pb2.GenerateRequest, context: Context, emit: Callable[[Any], Any]) -> None:
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        metadata = context.invocation_metadata()
        await self._calls.run(request, emit, metadata=metadata, deadline_s=deadline_s, principal=principal())

    @contextlib.asynccontextmanager
    async def _answering(self, context: Context) -> AsyncIterator[None]:
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


def _well_formed(request: MessageT | Malformed) -> MessageT:
    if isinstance(request, Malformed):
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"request: its bytes are no valid message ({request.problem}); send protobuf with UTF-8 strings",
        )
    return request


def _reader(message_type: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Parse, or say why not: an exception here would reach the client as a bare INTERNAL."""

    def read(data: bytes) -> Message | Malformed:
        try:
            return message_type.FromString(data)
        except DecodeError as error:
            return Malformed(str(error))

    return read


def _write(message: Message) -> bytes:
    return message.SerializeToString()
