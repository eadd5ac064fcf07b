"""The routes of the HTTP door, and what stands before a generation: size, key, JSON."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from expertmesh.mesh.api_keys import Scope
from expertmesh.mesh.config_http import HttpConfig
from expertmesh.mesh.gate import Denied, Gate, Principal
from expertmesh.mesh.http_protocol import CERTIFICATE_KEY
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.router import validation
from expertmesh.router.calls import Call, Calls
from expertmesh.router.errors import Refusal, invalid
from expertmesh.router.http.answers import Answering, ChatShape, CompletionShape, Shape
from expertmesh.router.http.errors import CLIENT_GONE, HttpError, http_error, plain_error, refusal_of
from expertmesh.router.http.generating import Generating, Job
from expertmesh.router.http.schema import ChatBody, CompletionBody, GenerationBody
from expertmesh.router.http.translate import chat_requests, completion_requests
from expertmesh.v1 import generate_pb2

PATHS = COMPLETIONS, CHAT, MODELS, HEALTH, METRICS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/metrics",
)
REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-request-timeout-ms"

BodyT = TypeVar("BodyT", bound=GenerationBody)
Translate = Callable[[BodyT, int], Sequence[generate_pb2.GenerateRequest]]


class HttpDoor:
    """Everything behind the port.

    Args:
        why_not_serving: '' while the mesh serves.
    """

    def __init__(
        self,
        calls: Calls,
        gate: Gate,
        config: HttpConfig,
        telemetry: Telemetry,
        why_not_serving: Callable[[], str],
    ) -> None:
        self._calls = calls
        self._gate = gate
        self._config = config
        self._telemetry = telemetry
        self._why_not_serving = why_not_serving
        self._created = int(time.time())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route(COMPLETIONS, self._completions, methods=["POST"]),
                Route(CHAT, self._chat, methods=["POST"]),
                Route(MODELS, self._models),
                Route(MODELS + "/{name:path}", self._model),
                Route(HEALTH, self._health),
                Route(METRICS, self._metrics),
            ],
            exception_handlers={
                Refusal: self._on_refusal,
                Denied: self._on_refusal,
                HTTPException: self._on_http_exception,
                ClientDisconnect: self._on_gone,
            },
        )

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionBody, completion_requests, CompletionShape)

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, ChatBody, chat_requests, ChatShape)

    async def _generate(
        self, request: Request, body_type: type[BodyT], translate: Translate[BodyT], shape_type: type[Shape]
    ) -> Response:
        arrived_s = time.monotonic()
        principal = self._admit(request, "generate")
        data = await self._read(request)
        try:
            body = body_type.model_validate_json(data)
        except ValidationError as error:
            raise refusal_of(error) from None
        requests = translate(body, self._config.max_choices)
        job_id = self._name(request, body, requests, shape_type)
        limits = self._calls.model.limits
        answering = Answering(
            id=job_id,
            created=int(time.time()),
            model=limits.name,
            fingerprint=f"fp_{self._calls.model.spec.fingerprint[:12]}",
            vocabulary=self._calls.model.vocabulary,
            with_logprobs=requests[0].sampling_params.HasField("logprobs"),
            with_token_ids=bool(body.return_token_ids),
            with_usage=body.wants_usage,
            choices_per_prompt=body.num_choices,
        )
        job = Job(
            id=job_id,
            requests=requests,
            shape=shape_type(answering),
            stream=bool(body.stream),
            call=Call(
                metadata=request.headers.items(), deadline_s=_deadline_s(request, arrived_s), principal=principal
            ),
            max_tokens_name=body.max_tokens_name,
        )
        # Starlette asks for its own class where it only calls the response.
        return Generating(self._calls, job, lambda status: self._count(request, status))  # type: ignore[return-value]

    def _name(
        self,
        request: Request,
        body: GenerationBody,
        requests: Sequence[generate_pb2.GenerateRequest],
        shape_type: type[Shape],
    ) -> str:
        """Give every generation its id; returns that of all of them."""
        given = body.request_id or request.headers.get(REQUEST_ID_HEADER)
        if given is not None:
            validation.check_name("request_id", given)
            if not given.isascii():
                raise invalid("request_id", "holds characters beyond ASCII", "use letters, digits, - and _")
        job_id = given or f"{shape_type.id_prefix}{uuid.uuid4().hex}"
        for index, choice in enumerate(requests):
            choice.request_id = job_id if len(requests) == 1 else f"{job_id}-{index}"
        return job_id

    async def _models(self, request: Request) -> Response:
        self._admit(request, "generate")
        return self._answer(request, {"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        self._admit(request, "generate")
        validation.check_model(request.path_params["name"], self._calls.model.limits)
        return self._answer(request, self._model_card())

    def _model_card(self) -> dict[str, object]:
        limits = self._calls.model.limits
        return {
            "id": limits.name,
            "object": "model",
            "created": self._created,
            "owned_by": "expertmesh",
            "max_model_len": limits.max_model_len,
        }

    async def _health(self, request: Request) -> Response:
        reason = self._why_not_serving()
        if not reason:
            return self._answer(request, {"status": "ok"})
        return self._refuse(request, plain_error(503, reason))

    async def _metrics(self, request: Request) -> Response:
        """What telemetry.metrics_port serves, for scrapers that know this port alone."""
        self._admit(request, "read")
        if self._telemetry.metrics_address is None:
            return self._refuse(request, plain_error(404, "metrics are off: set telemetry.metrics_port"))
        from prometheus_client.exposition import choose_encoder
        from prometheus_client.registry import CollectorRegistry

        from expertmesh.mesh.telemetry.prometheus import MetricsCollector

        registry = CollectorRegistry()
        registry.register(MetricsCollector(self._telemetry.metrics))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        self._count(request, 200)
        return Response(encode(registry), media_type=content_type)

    def _admit(self, request: Request, scope: Scope) -> Principal:
        """
        Raises:
            Denied: no key, a wrong one, or one over its limits.
        """
        presented = request.headers.getlist("authorization")
        peer = f"{request.client.host}:{request.client.port}" if request.client is not None else ""
        action = f"{request.method} {request.url.path}"
        certificate = request.scope.get(CERTIFICATE_KEY)
        header = ", ".join(presented) or None
        return self._gate.admit_header(header, scope, peer=peer, action=action, certificate=certificate)

    async def _read(self, request: Request) -> bytes:
        """
        Raises:
            HTTPException: 413, too large.
            ClientDisconnect: it went away while it sent.
        """
        limit = self._config.max_body_bytes
        declared = request.headers.get("content-length", "0")
        parts: list[bytes] = []
        size = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 19 else 0
        if size <= limit:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    break
                parts.append(part)
        if size > limit:
            text = f"the body has more than {limit} bytes (router.http.max_body_bytes): send a shorter prompt"
            # What is still on its way is read and dropped: a closed connection would drop this answer too.
            raise HTTPException(413, text)
        return b"".join(parts)

    async def _on_refusal(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal | Denied)
        return self._refuse(request, http_error(error))

    async def _on_http_exception(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}" if error.status_code != 413 else error.detail
        return self._refuse(request, plain_error(error.status_code, message), error.headers)

    async def _on_gone(self, request: Request, error: Exception) -> Response:
        self._count(request, CLIENT_GONE)
        return Response(status_code=CLIENT_GONE)

    def _answer(self, request: Request, body: object) -> Response:
        self._count(request, 200)
        return JSONResponse(body)

    def _refuse(self, request: Request, error: HttpError, headers: Mapping[str, str] | None = None) -> Response:
        self._count(request, error.status)
        return JSONResponse(error.body(), error.status, headers={**error.headers(), **(headers or {})})

    def _count(self, request: Request, status: int) -> None:
        path = request.url.path if request.url.path in PATHS else "other"
        self._telemetry.metrics.http_requests.add(1, route=path, code=str(status))


def _deadline_s(request: Request, arrived_s: float) -> float | None:
    """On ``time.monotonic``."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0):
        raise invalid(TIMEOUT_HEADER, f"{text[:40]!r} is no time", "send a whole number of milliseconds")
    return arrived_s + int(text) / 1000
