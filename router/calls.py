"""The one way from a door into the mesh: gRPC, HTTP and vLLM's service all generate through ``Calls.run``."""

from __future__ import annotations

import asyncio
import time

import grpc

from expertmesh.mesh.gate import ANYBODY, Principal
from expertmesh.mesh.telemetry.tracing import Metadata
from expertmesh.router.errors import Refusal
from expertmesh.router.model import RouterModel
from expertmesh.router.runner import Caller, Emit, Runner
from expertmesh.router.spans import RequestObserver, RequestTelemetry
from expertmesh.v1 import generate_pb2


class Calls:
    """Generations of one router, whatever door they came through."""

    def __init__(self, runner: Runner, model: RouterModel, observer: RequestObserver) -> None:
        self.runner = runner
        self.model = model
        self._observer = observer

    async def run(
        self,
        request: generate_pb2.GenerateRequest,
        emit: Emit,
        *,
        metadata: Metadata | None,
        deadline_s: float | None = None,
        principal: Principal = ANYBODY,
    ) -> None:
        """Generate; ``emit`` gets every message, the last one with ``finish``.

        Args:
            metadata: of the call, or its headers; may carry a W3C trace context.
            deadline_s: on ``time.monotonic``; None = none.

        Raises:
            Refusal: the status that the request ends with.
            CancelledError: the client went away; nothing of the request remains.
        """
        telemetry = RequestTelemetry(
            self._observer,
            operation="chat" if request.WhichOneof("input") == "chat" else "text_completion",
            metadata=metadata,
        )
        caller = Caller(deadline_s=deadline_s, telemetry=telemetry, principal=principal)
        try:
            await self.runner.run(request, caller, emit)
        except Refusal as refusal:
            telemetry.refused(refusal.code, refusal.message)
            raise
        except (asyncio.CancelledError, grpc.aio.InternalError):
            telemetry.abandoned(deadline_passed=deadline_s is not None and time.monotonic() >= deadline_s)
            raise
        finally:
            telemetry.end()
