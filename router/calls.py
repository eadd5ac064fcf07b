"""The one way from a door into the mesh: gRPC, HTTP and vLLM's service all generate through ``Calls.run``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc

from expertmesh.mesh.gate import ANYBODY, Principal
from expertmesh.mesh.telemetry.tracing import Metadata
from expertmesh.router.errors import Refusal
from expertmesh.router.model import RouterModel
from expertmesh.router.runner import Caller, Emit, Runner
from expertmesh.router.spans import RequestObserver, RequestTelemetry, around_choices
from expertmesh.v1 import generate_pb2

DEADLINE_SLACK_S = 0.25
"""A client's deadline began when it sent the request, and ends the call so much earlier than ours would."""

EmitChoice = Callable[[int, generate_pb2.GenerateResponse], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a call says beside its message.

    ``metadata``: its own, or its headers; may carry a W3C trace context. ``deadline_s``: on ``time.monotonic``; None =
    none.
    """

    metadata: Metadata | None
    deadline_s: float | None = None
    principal: Principal = ANYBODY


class Calls:
    """Generations of one router, whatever door they came through."""

    def __init__(self, runner: Runner, model: RouterModel, observer: RequestObserver) -> None:
        self.runner = runner
        self.model = model
        self._observer = observer

    async def run(self, request: generate_pb2.GenerateRequest, emit: Emit, call: Call) -> None:
        """Generate; ``emit`` gets every message, the last one with ``finish``.

        Raises:
            Refusal: the status that the request ends with.
            CancelledError: the client went away; nothing of the request remains.
        """
        telemetry = RequestTelemetry(
            self._observer,
            operation="chat" if request.WhichOneof("input") == "chat" else "text_completion",
            metadata=call.metadata,
        )
        caller = Caller(deadline_s=call.deadline_s, telemetry=telemetry, principal=call.principal)
        try:
            await self.runner.run(request, caller, emit)
        except Refusal as refusal:
            telemetry.refused(refusal.code, refusal.message)
            raise
        except (asyncio.CancelledError, grpc.aio.InternalError):
            is_late = call.deadline_s is not None and time.monotonic() >= call.deadline_s - DEADLINE_SLACK_S
            telemetry.abandoned(deadline_passed=is_late)
            raise
        finally:
            telemetry.end()

    async def run_all(self, requests: Sequence[generate_pb2.GenerateRequest], emit: EmitChoice, call: Call) -> None:
        """Generate the choices of one answer beside each other, in one trace; ``emit`` gets their indices too.

        Raises:
            Refusal: of the first that was refused; the others are cancelled.
        """

        async def run(index: int, call: Call) -> None:
            async def emit_one(response: generate_pb2.GenerateResponse) -> None:
                await emit(index, response)

            await self.run(requests[index], emit_one, call)

        if len(requests) == 1:
            await run(0, call)
            return
        with around_choices(self._observer, call.metadata, len(requests)) as metadata:
            failure = await _first_failure(
                run(index, replace(call, metadata=metadata)) for index in range(len(requests))
            )
            try:
                if failure is not None:
                    raise failure
            finally:
                del failure  # it keeps this frame


async def _first_failure(runs: Iterable[Coroutine[Any, Any, None]]) -> BaseException | None:
    """Run them beside each other; what the first of them failed with, after which the others are cancelled.

    A group of tasks keeps the errors that it raises in the frames that these keep: they leave here without them.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(run)
    except BaseExceptionGroup as errors:
        errors.__traceback__ = None
        return errors.exceptions[0]
    except asyncio.CancelledError as error:
        raise error.with_traceback(None) from None
    return None
