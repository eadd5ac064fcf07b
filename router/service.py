"""``GenerationService``: gRPC in, gRPC out; the work is the runner's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from expertmesh.mesh.rpc_door import principal
from expertmesh.router.calls import Calls
from expertmesh.router.wire import Context, Malformed, answering, call_of, reader, well_formed, write
from expertmesh.v1 import generate_pb2

SERVICE_NAME = "expertmesh.v1.GenerationService"


class GenerationService:
    """The request API of one router."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the service to a server; returns its full name."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": stream(self.generate, reader(generate_pb2.GenerateRequest), write),
            "GenerateUnary": unary(self.generate_unary, reader(generate_pb2.GenerateRequest), write),
            "Abort": unary(self.abort, reader(generate_pb2.AbortRequest), write),
            "GetModelInfo": unary(self.get_model_info, reader(generate_pb2.GetModelInfoRequest), write),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        return (SERVICE_NAME,)

    async def generate(self, request: generate_pb2.GenerateRequest | Malformed, context: Context) -> None:
        async with answering(context):
            await self._run(well_formed(request), context, context.write)

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

        async with answering(context):
            await self._run(well_formed(request), context, collect)
        whole.text = "".join(texts)
        return whole

    async def abort(
        self, request: generate_pb2.AbortRequest | Malformed, context: Context
    ) -> generate_pb2.AbortResponse:
        async with answering(context):
            found = self._calls.runner.cancel(well_formed(request).request_id, principal())
            return generate_pb2.AbortResponse(found=found)

    async def get_model_info(
        self, request: generate_pb2.GetModelInfoRequest | Malformed, context: Context
    ) -> generate_pb2.GetModelInfoResponse:
        async with answering(context):
            well_formed(request)
            return self._calls.model.info()

    async def _run(self, request: generate_pb2.GenerateRequest, context: Context, emit: Callable[[Any], Any]) -> None:
        await self._calls.run(request, emit, call_of(context))
