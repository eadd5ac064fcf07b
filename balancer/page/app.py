"""The page and what it asks for, as an ASGI application: static files and read-only JSON.

The JSON is the admin service's answers as protobuf writes them, with the names of the contract; ``int64`` are strings
there, as protobuf's JSON has them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from expertmesh.balancer.standby import NotLeadingError
from expertmesh.v1 import admin_pb2

STATIC = Path(__file__).parent / "static"
EVENTS_AT_ONCE = 200
HEADERS = {
    # Nothing is loaded from elsewhere, nothing may frame the page, nothing is kept where others could read it.
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Admin(Protocol):
    """What the page asks the balancer: the reading half of ``AdminService``. None of these uses its context."""

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Any) -> admin_pb2.GetStatusResponse: ...

    async def GetPlacement(
        self, request: admin_pb2.GetPlacementRequest, context: Any
    ) -> admin_pb2.GetPlacementResponse: ...

    async def GetLoads(self, request: admin_pb2.GetLoadsRequest, context: Any) -> admin_pb2.GetLoadsResponse: ...

    async def GetCoactivation(
        self, request: admin_pb2.GetCoactivationRequest, context: Any
    ) -> admin_pb2.GetCoactivationResponse: ...

    def ListEvents(
        self, request: admin_pb2.ListEventsRequest, context: Any
    ) -> AsyncIterator[admin_pb2.ListEventsResponse]: ...


def page_app(leading: Callable[[], Admin], may_read: Callable[[Scope], bool] = lambda scope: True) -> Starlette:
    """
    Args:
        leading: what answers now.
        may_read: whether the caller of this ASGI scope may see the mesh; the page itself shows nothing of it.

    Raises (``leading``):
        NotLeadingError: another balancer answers.
    """
    routes = [
        Route("/api/status", _answer(leading, _status)),
        Route("/api/placement", _answer(leading, _placement)),
        Route("/api/loads", _answer(leading, _loads)),
        Route("/api/coactivation/{layer:int}", _answer(leading, _coactivation)),
        Route("/api/events", _answer(leading, _events)),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    middleware = [Middleware(_Headers), Middleware(_Door, may_read=may_read)]
    return Starlette(routes=routes, middleware=middleware)


def _answer(
    leading: Callable[[], Admin], ask: Callable[[Admin, Request], Awaitable[Any]]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            found = await ask(leading(), request)
        except NotLeadingError as error:
            return _problem(503, str(error))
        except ValueError as error:
            return _problem(400, str(error))
        return JSONResponse(found)

    return endpoint


def _problem(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)


def as_json(message: Message) -> dict[str, Any]:
    """Every field, also those at their defaults: the page need not know them."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


async def _status(admin: Admin, request: Request) -> dict[str, Any]:
    return as_json(await admin.GetStatus(admin_pb2.GetStatusRequest(), None))


async def _placement(admin: Admin, request: Request) -> dict[str, Any]:
    return as_json(await admin.GetPlacement(admin_pb2.GetPlacementRequest(), None))


async def _loads(admin: Admin, request: Request) -> dict[str, Any]:
    return as_json(await admin.GetLoads(admin_pb2.GetLoadsRequest(), None))


async def _coactivation(admin: Admin, request: Request) -> dict[str, Any]:
    layer = int(request.path_params["layer"])
    moe_layers = (await admin.GetStatus(admin_pb2.GetStatusRequest(), None)).model.moe_layers
    if layer not in moe_layers:
        raise ValueError(f"layer {layer} is no MoE layer of this model; it has {list(moe_layers)}")
    return as_json(await admin.GetCoactivation(admin_pb2.GetCoactivationRequest(layer=layer), None))


async def _events(admin: Admin, request: Request) -> list[dict[str, Any]]:
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) < 20):
        raise ValueError(f"after is {after!r}: give the number of the last event that you have, or 0")
    asked = admin_pb2.ListEventsRequest(after=int(after), limit=EVENTS_AT_ONCE)
    return [as_json(event) async for event in admin.ListEvents(asked, None)]


class _Headers:
    """Adds ``HEADERS`` to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _Door:
    """Refuses the mesh's figures to whoever may not read them."""

    def __init__(self, app: Any, may_read: Callable[[Scope], bool]) -> None:
        self._app = app
        self._may_read = may_read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/api/") and not self._may_read(scope):
            refusal = _problem(401, "give an API key with the scope 'read' as 'Authorization: Bearer KEY'")
            refusal.headers["www-authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)
