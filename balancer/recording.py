"""Recordings of token-level routing: one at a time, from every attention server to one administrator."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from expertmesh.balancer.actual import LIVE, Actual
from expertmesh.balancer.members import Member
from expertmesh.balancer.refusal import RefusedError
from expertmesh.v1 import admin_pb2, mesh_pb2

log = logging.getLogger(__name__)

MAX_TOKENS = 10_000_000
IDLE_TIMEOUT_S = 60.0
"""A recording ends when no token has come for so long."""
_TELL_INTERVAL_S = 0.2  # servers that join or come back are told to record this soon
_QUEUED_BYTES = 64 << 20  # an administrator who reads more slowly than this fills up is cut off


@dataclass(slots=True)
class _Recording:
    record_id: int
    left: int  # tokens that are still wanted
    heard_s: float  # when tokens came last
    parts: asyncio.Queue[admin_pb2.RecordResponse] = field(default_factory=asyncio.Queue)
    queued_bytes: int = 0
    received: dict[str, int] = field(default_factory=dict)  # incarnation → tokens
    told: dict[str, int] = field(default_factory=dict)  # incarnation → the session that it was told on


class Recordings:
    """
    Args:
        send: a message on a session.
        clock: monotonic seconds.
    """

    def __init__(
        self, actual: Actual, send: Callable[[int, mesh_pb2.JoinResponse], None], clock: Callable[[], float]
    ) -> None:
        self._actual = actual
        self._send = send
        self._clock = clock
        self._current: _Recording | None = None

    async def record(self, request: admin_pb2.RecordRequest) -> AsyncGenerator[admin_pb2.RecordResponse]:
        """Parts of the recording as they come, an empty one from each server that has begun, ``max_tokens`` in all;
        fewer when traffic ceases for ``IDLE_TIMEOUT_S``. A server that dies takes with it what it has not sent, the
        others go on.

        Raises:
            RefusedError: INVALID_ARGUMENT, ALREADY_EXISTS while another recording runs, FAILED_PRECONDITION
                without a view, DEADLINE_EXCEEDED when no token came at all, RESOURCE_EXHAUSTED when the parts are not
                read.
        """
        self._check(request)
        recording = _Recording(secrets.randbits(63) | 1, request.max_tokens, self._clock())
        self._current = recording
        log.info("recording of %d tokens begins", request.max_tokens)
        try:
            while (part := await self._next(recording)) is not None:
                yield part
        finally:
            self._current = None
            self._stop(recording)
            log.info("recording ends with %d of %d tokens", request.max_tokens - recording.left, request.max_tokens)

    def hear(self, member: Member, chunk: mesh_pb2.TraceChunk) -> None:
        """A chunk came on the stream of a member."""
        recording = self._current
        if recording is None or chunk.record_id != recording.record_id:
            self._control(member, mesh_pb2.RecordControl(id=chunk.record_id))
            return
        known = recording.received.get(member.incarnation, 0)
        model, size = self._actual.model, chunk.num_tokens * chunk.top_k * len(self._actual.model.moe_layers)
        topk = np.frombuffer(chunk.topk, "<i2") if len(chunk.topk) == 2 * size else None
        if topk is None or (size and not -1 <= topk.min() <= topk.max() < model.num_experts):
            log.warning("%s sent a trace that is not of this model: it is left out", member.server_id)
            return
        if chunk.first_token < known:
            return  # it came before, on a connection that broke
        count = min(chunk.num_tokens, recording.left)
        if count:
            recording.received[member.incarnation] = chunk.first_token + chunk.num_tokens
            recording.left -= count
            recording.heard_s = self._clock()
        elif chunk.first_token or chunk.done:
            return  # too many, or none and not even the first chunk
        topk_LTK = topk.reshape(len(model.moe_layers), chunk.num_tokens, chunk.top_k)[:, :count]
        part = admin_pb2.RecordResponse(
            server_id=member.server_id,
            num_experts=model.num_experts,
            layers=model.moe_layers,
            num_tokens=count,
            top_k=chunk.top_k,
            topk=topk_LTK.tobytes(),
        )
        recording.queued_bytes += len(part.topk)
        recording.parts.put_nowait(part)

    def _check(self, request: admin_pb2.RecordRequest) -> None:
        if not 0 < request.max_tokens <= MAX_TOKENS:
            text = f"max_tokens is {request.max_tokens}: record 1 to {MAX_TOKENS} tokens"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, text)
        if self._current is not None:
            text = "another recording runs: wait for its end"
            raise RefusedError(grpc.StatusCode.ALREADY_EXISTS, text)
        if self._actual.phase not in LIVE:
            text = f"nothing is served: {self._actual.why_not_serving()}"
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, text)

    async def _next(self, recording: _Recording) -> admin_pb2.RecordResponse | None:
        """The next part, None at the end."""
        while recording.left or not recording.parts.empty():
            if recording.queued_bytes > _QUEUED_BYTES:
                text = "the recording is read too slowly: record fewer tokens"
                raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            self._tell(recording)
            try:
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with a part.
                async with asyncio.timeout(_TELL_INTERVAL_S):
                    part = await recording.parts.get()
            except TimeoutError:
                if self._clock() - recording.heard_s <= IDLE_TIMEOUT_S:
                    continue
                if recording.received:
                    return None
                text = f"no token was routed for {IDLE_TIMEOUT_S:g} s"
                raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
            recording.queued_bytes -= len(part.topk)
            return part
        return None

    def _tell(self, recording: _Recording) -> None:
        for member in self._actual.members.ranks():
            is_told = recording.told.get(member.incarnation) == member.session
            if member.has_attention and member.session is not None and not is_told:
                recording.told[member.incarnation] = member.session
                self._control(member, mesh_pb2.RecordControl(id=recording.record_id, max_tokens=recording.left))

    def _stop(self, recording: _Recording) -> None:
        for member in self._actual.members.ranks():
            if member.incarnation in recording.told:
                self._control(member, mesh_pb2.RecordControl(id=recording.record_id))

    def _control(self, member: Member, control: mesh_pb2.RecordControl) -> None:
        if member.session is not None:
            self._send(member.session, mesh_pb2.JoinResponse(record=control))
