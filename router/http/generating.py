"""The generations of one HTTP request, from their start to the last byte, or to the client's going away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from expertmesh.mesh.http_protocol import ABORT_KEY
from expertmesh.router.calls import Call, Calls
from expertmesh.router.errors import Refusal
from expertmesh.router.http.answers import DONE, Choice, Shape, event, to_json
from expertmesh.router.http.errors import CLIENT_GONE, HttpError, http_error, plain_error
from expertmesh.v1 import generate_pb2

log = logging.getLogger(__name__)

LAST_WORDS_TIMEOUT_S = 1.0
"""For telling a client why its stream ends early; one that reads nothing is not told."""

_JSON = (b"content-type", b"application/json")
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is asked for. ``requests``: one a choice."""

    id: str
    requests: Sequence[generate_pb2.GenerateRequest]
    shape: Shape
    stream: bool
    call: Call
    max_tokens_name: str


class Generating:
    """An ASGI response. The status is that of the first message: nothing is sent before there is one, or a refusal.

    Args:
        count: is told the status in the end.
    """

    def __init__(self, calls: Calls, job: Job, count: Callable[[int], None]) -> None:
        self._calls = calls
        self._job = job
        self._count = count
        self._choices = [Choice(index) for index in range(len(job.requests))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send, self._job.id)
        work = asyncio.create_task(self._work(answer), name=f"http-{self._job.id}")
        gone = asyncio.create_task(_until_gone(receive), name=f"http-gone-{self._job.id}")
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            # The attention servers let go of what was cancelled in here.
            await asyncio.gather(work, gone, return_exceptions=True)
        try:
            work.result()  # where it was cancelled too: a task keeps that error, and what it came through, until asked
        except asyncio.CancelledError:
            self._count(CLIENT_GONE)
            return
        self._count(answer.status)
        if not answer.complete:
            scope[ABORT_KEY]()

    async def _work(self, answer: _Answer) -> None:
        try:
            await (self._stream(answer) if self._job.stream else self._whole(answer))
        except Refusal as refusal:
            await self._refuse(answer, http_error(refusal, max_tokens_name=self._job.max_tokens_name))
        except Exception:
            log.exception("%s failed", self._job.id)
            error = plain_error(500, "an internal error; the server's log has the details")
            await self._refuse(answer, error)

    async def _whole(self, answer: _Answer) -> None:
        async def keep(index: int, response: generate_pb2.GenerateResponse) -> None:
            self._choices[index].keep(response)

        await self._calls.run_all(self._job.requests, keep, self._job.call)
        await answer.whole(200, to_json(self._job.shape.whole(self._choices)))

    async def _stream(self, answer: _Answer) -> None:
        shape = self._job.shape
        begun: set[int] = set()

        async def write(index: int, response: generate_pb2.GenerateResponse) -> None:
            choice = self._choices[index]
            data = shape.chunk(choice, response)
            if index not in begun:
                begun.add(index)
                first = shape.first(choice)
                data = data if first is None else event(first) + data
            if data:
                await answer.write(data)

        await self._calls.run_all(self._job.requests, write, self._job.call)
        usage = shape.last(self._choices)
        await answer.write((event(usage) if usage is not None else b"") + DONE, last=True)

    async def _refuse(self, answer: _Answer, error: HttpError) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
                if answer.status:  # a stream has begun: its status cannot be taken back
                    await answer.write(event(error.body()) + DONE, last=True)
                else:
                    await answer.refuse(error)
        except TimeoutError:
            log.debug("%s: its client reads nothing: not told that %s", self._job.id, error.message)


class _Answer:
    """What goes over the wire; the head of a stream waits for its first bytes."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id = (b"x-request-id", request_id.encode())
        self._writing = asyncio.Lock()  # several choices write into one stream
        self.status = 0
        self.complete = False

    async def write(self, data: bytes, *, last: bool = False) -> None:
        async with self._writing:
            if not self.status:
                self.status = 200
                await self._start((*_EVENTS, self._id))
            await self._body(data, last)

    async def whole(self, status: int, data: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.status = status
        await self._start((_JSON, (b"content-length", str(len(data)).encode()), self._id, *headers))
        await self._body(data, last=True)

    async def refuse(self, error: HttpError) -> None:
        headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
        await self.whole(error.status, error.json(), headers)

    async def _start(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": self.status, "headers": list(headers)})

    async def _body(self, data: bytes, last: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self.complete = last


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
