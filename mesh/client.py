"""A client of the request API, for the command line, tests and benchmarks; a program outside can use it as well."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.client_key import key_metadata
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.telemetry import inject_metadata
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

FINISH_NAMES = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_CANCELLED: "cancelled",
}
_MAX_RESPONSE_BYTES = 64 * 2**20  # a whole answer with 20 log probabilities a token


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole answer. ``token_ids``: the generated ones only."""

    request_id: str
    text: str
    token_ids: list[int]
    finish: generate_pb2.Finish
    logprobs: list[generate_pb2.TokenLogprob] = field(default_factory=list)

    @property
    def finish_reason(self) -> str:
        """``stop``, ``length`` or ``cancelled``."""
        return FINISH_NAMES[self.finish.reason]


def build_request(
    prompt: str | Sequence[int],
    *,
    request_id: str = "",
    model: str = "",
    priority: int = 0,
    tenant: str = "",
    disable_replay: bool = False,
    **sampling: Any,
) -> generate_pb2.GenerateRequest:
    """A request for text or for token ids.

    Args:
        sampling: fields of ``SamplingParams``; what is left out or ``None`` is the model's default.

    Raises:
        ValueError, TypeError: a field that does not exist, or a value that protobuf cannot hold.
    """
    given = {name: value for name, value in sampling.items() if value is not None}
    request = generate_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        priority=priority,
        tenant=tenant,
        disable_replay=disable_replay,
        sampling_params=generate_pb2.SamplingParams(**given),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokenized.CopyFrom(generate_pb2.TokenizedInput(input_ids=prompt))
    return request


class GenerateClient:
    """Speaks to one router. Use it as an asynchronous context manager, or ``close`` it.

    Args:
        address: ``host:port``.
        tls: where it names a CA or a certificate, the connection uses TLS.
        api_key: that the router asks for, if it does.
    """

    def __init__(self, address: str, tls: TlsConfig | None = None, api_key: str | None = None) -> None:
        self._channel = rpc.open_channel(
            address, tls or TlsConfig(), max_message_bytes=_MAX_RESPONSE_BYTES, role="router"
        )
        self._key = key_metadata(api_key)
        self._stub = generate_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> GenerateClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def stream(
        self, request: generate_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Messages as they come; leaving the iteration early cancels the request.

        The current trace context goes along.

        Raises:
            grpc.aio.AioRpcError: the router refused the request or could not finish it.
        """
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata())
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()

    async def generate(self, request: generate_pb2.GenerateRequest, *, timeout_s: float | None = None) -> Completion:
        """The whole answer, over one message.

        Raises:
            grpc.aio.AioRpcError: the router refused the request or could not finish it.
        """
        response = await self._stub.GenerateUnary(request, timeout=timeout_s, metadata=self._metadata())
        return Completion(
            request_id=response.request_id,
            text=response.text,
            token_ids=list(response.token_ids),
            finish=response.finish,
            logprobs=list(response.logprobs),
        )

    async def complete(self, request: generate_pb2.GenerateRequest, *, timeout_s: float | None = None) -> Completion:
        """The whole answer, put together from the stream; unlike ``generate`` it can be aborted half-way.

        Raises:
            grpc.aio.AioRpcError: the router refused the request or could not finish it.
        """
        texts: list[str] = []
        token_ids: list[int] = []
        logprobs: list[generate_pb2.TokenLogprob] = []
        last = generate_pb2.GenerateResponse()
        async for response in self.stream(request, timeout_s=timeout_s):
            assert not last.HasField("finish"), "a message came after the finish"
            texts.append(response.text)
            token_ids += response.token_ids
            logprobs += response.logprobs
            last = response
        assert last.HasField("finish"), "a stream that ends with OK ends with its finish"
        return Completion(
            request_id=last.request_id,
            text="".join(texts),
            token_ids=token_ids,
            finish=last.finish,
            logprobs=logprobs,
        )

    async def abort(self, request_id: str, *, timeout_s: float = 5.0) -> bool:
        """End a running request; whether there was one."""
        request = generate_pb2.AbortRequest(request_id=request_id)
        return (await self._stub.Abort(request, timeout=timeout_s, metadata=self._key)).found

    async def model_info(self, *, timeout_s: float = 5.0) -> generate_pb2.GetModelInfoResponse:
        request = generate_pb2.GetModelInfoRequest()
        return await self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._key)

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (*inject_metadata(), *self._key)


def status_line(error: grpc.aio.AioRpcError) -> str:
    """``INVALID_ARGUMENT: what was wrong``, for people."""
    return f"{error.code().name}: {error.details()}"
