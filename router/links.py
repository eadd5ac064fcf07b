"""One ``AttentionService.Link`` to one attention server: requests out, the tokens of each step in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.router.generation import UNSPECIFIED, Generation
from expertmesh.v1 import attention_pb2, attention_pb2_grpc

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
_MAX_RETRY_S = 1.0
_MAX_RESPONSE_BYTES = 64 * 2**20  # one step's tokens of every request, with 20 log probabilities each

LinkCall = grpc.aio.StreamStreamCall[attention_pb2.LinkRequest, attention_pb2.LinkResponse]


@dataclass(slots=True)
class _Sequence:
    """A request on this link. ``outstanding_tokens``: to prefill and to generate, at most."""

    generation: Generation
    outstanding_tokens: int


class AttentionLink:
    """The link to one attention server; ``run`` keeps it connected.

    Args:
        role: the server's, ``attention`` or ``both``: what its certificate has to say.
        on_change: called when the server starts or stops serving.
    """

    def __init__(
        self,
        *,
        server_id: str,
        address: str,
        role: str,
        hello: attention_pb2.LinkHello,
        tls: TlsConfig,
        on_change: Callable[[], None],
    ) -> None:
        self.server_id = server_id
        self.address = address
        self._role = role
        self.serving = False
        self.retired = False
        """No longer in the view: it takes nothing new."""
        self.problem = "connecting"
        """Why it does not serve."""
        self.not_serving_since_s = time.monotonic()
        self.kv_source: attention_pb2.KvSource | None = None
        """Where others can fetch the KV blocks of prompts that it computed."""
        self.num_waiting = 0
        """Requests, of all routers, that the server last said wait for a place in its batch."""
        self.num_routers = 1
        """Routers that the server last said are linked to it, this one included."""
        self._hello = hello
        self._tls = tls
        self._on_change = on_change
        self._sequences: dict[int, _Sequence] = {}
        self._next_handle = 1
        self._own_outstanding_tokens = 0
        self._others_outstanding_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._outbox: deque[attention_pb2.LinkRequest] = deque()
        self._outbox_filled = asyncio.Event()

    @property
    def outstanding_tokens(self) -> int:
        """Of this router's requests as they are now, of the other routers' as the server last said."""
        return self._own_outstanding_tokens + self._others_outstanding_tokens

    def submit(self, generation: Generation, submit: attention_pb2.Submit) -> int:
        """Send a request; returns its handle. What comes of it goes to ``generation``."""
        handle = self._next_handle
        self._next_handle += 1
        submit.handle = handle
        tokens = len(submit.prompt_token_ids) + submit.sampling_params.max_tokens
        self._sequences[handle] = _Sequence(generation, tokens)
        self._idle.clear()
        self._own_outstanding_tokens += tokens
        self._send(attention_pb2.LinkRequest(submit=submit))
        return handle

    def abort(self, handle: int) -> None:
        """Forget a request; the server is told if it still has it."""
        if self._forget(handle):
            self._send(attention_pb2.LinkRequest(abort=attention_pb2.AbortSequence(handle=handle)))

    async def wait_idle(self, timeout_s: float) -> None:
        """Until no request runs on the link.

        Raises:
            TimeoutError: some still do.
        """
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    async def run(self) -> None:
        """Connect, and connect again, until cancelled; then every request on it is lost."""
        retry_s = _FIRST_RETRY_S
        try:
            while not self.retired:
                certificates = rpc.files_stamp(self._tls)
                async with rpc.open_channel(
                    self.address, self._tls, max_message_bytes=_MAX_RESPONSE_BYTES, role=self._role
                ) as channel:
                    stub = attention_pb2_grpc.AttentionServiceStub(channel)
                    while not self.retired and rpc.files_stamp(self._tls) == certificates:
                        answered, reason = await self._session(stub)
                        retry_s = _FIRST_RETRY_S if answered else min(2 * retry_s, _MAX_RETRY_S)
                        self._lose(reason)
                        if not self.retired:
                            await asyncio.sleep(retry_s)
        finally:
            self._lose("it left the view" if self.retired else "the router stops")

    async def _session(self, stub: attention_pb2_grpc.AttentionServiceStub) -> tuple[bool, str]:
        """One call from hello to its end; whether the server answered, and why it ended."""
        call = stub.Link()
        answered = False
        self._outbox.clear()
        self._send(attention_pb2.LinkRequest(hello=self._hello))
        writer = asyncio.create_task(self._write_outbox(call), name=f"link-outbox-{self.server_id}")
        try:
            async for response in call:
                answered = True
                self._on_response(response)
        except grpc.aio.AioRpcError as error:
            level = logging.DEBUG if error.code() is grpc.StatusCode.UNAVAILABLE and not answered else logging.WARNING
            log.log(level, "attention server %s: %s: %s", self.server_id, error.code().name, error.details())
            return answered, f"{error.code().name}: {error.details()}"
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.wait([writer], timeout=_MAX_RETRY_S)
        return answered, "it closed the link"

    async def _write_outbox(self, call: LinkCall) -> None:
        try:
            while True:
                while self._outbox:
                    await call.write(self._outbox.popleft())
                self._outbox_filled.clear()
                await self._outbox_filled.wait()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError) as error:  # the reader sees the end and its status
            log.debug("attention server %s: write: %s", self.server_id, error)

    def _send(self, request: attention_pb2.LinkRequest) -> None:
        self._outbox.append(request)
        self._outbox_filled.set()

    def _on_response(self, response: attention_pb2.LinkResponse) -> None:
        now_s = time.monotonic()
        self._on_columns(response.handles, response.token_ids, now_s)
        for delta in response.deltas:
            self._on_delta(delta, now_s)
        if response.HasField("load"):
            # What the server says counts every router's requests but is a step old: added to our own, which may have
            # grown since. The larger of the two would hide from a router what it has just sent beside others.
            others = response.load.outstanding_tokens - self._own_outstanding_tokens
            self._others_outstanding_tokens = max(0, others)
            self.num_routers = max(1, response.load.num_routers)
            self.num_waiting = response.load.num_requests_waiting
            self.kv_source = response.load.kv_source if response.load.HasField("kv_source") else None
            self._set_serving(response.load.serving, "its rank is in no view that steps")

    def _on_columns(self, handles: Sequence[int], token_ids: Sequence[int], now_s: float) -> None:
        """A token for each of the sequences: nearly all that comes, so it does nothing that a step could do once."""
        sequences, done = self._sequences, 0
        for handle, token_id in zip(handles, token_ids, strict=True):
            sequence = sequences.get(handle)
            if sequence is None:  # aborted a moment ago
                continue
            if sequence.outstanding_tokens:
                sequence.outstanding_tokens -= 1
                done += 1
            if not sequence.generation.on_token(token_id, now_s):
                self.abort(handle)
        self._own_outstanding_tokens -= done

    def _on_delta(self, delta: attention_pb2.TokenDelta, now_s: float) -> None:
        sequence = self._sequences.get(delta.handle)
        if sequence is None:  # aborted a moment ago
            return
        generation = sequence.generation
        done = min(len(delta.token_ids), sequence.outstanding_tokens)
        sequence.outstanding_tokens -= done
        self._own_outstanding_tokens -= done
        wants_more = generation.on_delta(delta, self.server_id, now_s)
        if delta.status_code or delta.finish_reason != UNSPECIFIED:
            self._forget(delta.handle)
        elif not wants_more:
            self.abort(delta.handle)

    def _forget(self, handle: int) -> bool:
        sequence = self._sequences.pop(handle, None)
        if sequence is None:
            return False
        self._own_outstanding_tokens -= sequence.outstanding_tokens
        self._note_idle()
        return True

    def _lose(self, reason: str) -> None:
        lost = f"attention server {self.server_id}: {reason}"
        sequences, self._sequences = self._sequences, {}
        self._note_idle()
        self._own_outstanding_tokens = self._others_outstanding_tokens = 0
        self._set_serving(False, reason)
        if sequences:
            log.warning("%s; %d requests go elsewhere", lost, len(sequences))
        for sequence in sequences.values():
            sequence.generation.on_lost(lost)

    def _note_idle(self) -> None:
        if not self._sequences:
            self._idle.set()

    def _set_serving(self, serving: bool, problem: str) -> None:
        if not serving:
            self.problem = problem
        if serving == self.serving:
            return
        self.serving = serving
        if not serving:
            self.not_serving_since_s = time.monotonic()
        self._on_change()
