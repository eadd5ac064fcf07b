"""A router's surroundings without a model: attention servers with a script, a balancer that says what it is told.

Both are real gRPC servers on loopback. The tokens of a sequence depend on the prompt, the seed and the position alone,
as they do on the real server, so a replay that skips or repeats a token shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import grpc

from expertmesh.v1 import attention_pb2, attention_pb2_grpc, generate_pb2, mesh_pb2, mesh_pb2_grpc

Script = Callable[[attention_pb2.Submit, int], int]
Context = grpc.aio.ServicerContext[Any, Any]

VOCAB_SIZE = 8192


def hashed_tokens(submit: attention_pb2.Submit, position: int) -> int:
    """Token ``position`` of the output; never an id below 2 (the demo model's special tokens)."""
    return expected_token(submit.prompt_token_ids, submit.sampling_params.seed, position)


def expected_token(prompt_token_ids: Sequence[int], seed: int, position: int) -> int:
    key = f"{list(prompt_token_ids)}/{seed}/{position}".encode()
    return 2 + int.from_bytes(blake2b(key, digest_size=4).digest()) % (VOCAB_SIZE - 2)


def expected_tokens(prompt_token_ids: Sequence[int], seed: int, num_tokens: int) -> list[int]:
    return [expected_token(prompt_token_ids, seed, position) for position in range(num_tokens)]


def scripted(token_ids: Sequence[int]) -> Script:
    """Every sequence says ``token_ids``, then the first id again and again."""

    def script(submit: attention_pb2.Submit, position: int) -> int:
        return token_ids[position] if position < len(token_ids) else token_ids[0]

    return script


@dataclass
class _Link:
    takes_columns: bool = False
    running: dict[int, attention_pb2.Submit] = field(default_factory=dict)
    emitted: dict[int, int] = field(default_factory=dict)
    outbox: asyncio.Queue[attention_pb2.LinkResponse] = field(default_factory=asyncio.Queue)
    broken: asyncio.Event = field(default_factory=asyncio.Event)


class FakeAttention(attention_pb2_grpc.AttentionServiceServicer):
    """One attention server. A step gives every running sequence ``tokens_per_step`` tokens in one message.

    It steps by itself while ``going`` is set. ``max_steps`` breaks every link after so many steps, as a dying server.
    One that makes no columns speaks as servers did before there were any.
    """

    def __init__(
        self,
        server_id: str,
        *,
        script: Script = hashed_tokens,
        tokens_per_step: int = 1,
        max_steps: int | None = None,
        makes_columns: bool = True,
    ) -> None:
        self.server_id = server_id
        self.incarnation = f"{server_id}-1"
        self.address = ""
        self.hellos: list[attention_pb2.LinkHello] = []
        self.submits: list[attention_pb2.Submit] = []
        self.aborts: list[int] = []
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.going = asyncio.Event()
        self.going.set()
        self._script = script
        self._tokens_per_step = tokens_per_step
        self._makes_columns = makes_columns
        self._steps_left = max_steps
        self._serving = True
        self._links: list[_Link] = []
        self._changed = asyncio.Condition()
        self._work = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._stepper: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        return sum(len(link.running) for link in self._links)

    async def start(self) -> FakeAttention:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._stepper = asyncio.create_task(self._step_for_ever(), name=f"fake-{self.server_id}")
        return self

    async def stop(self) -> None:
        """At once, as kill -9 does."""
        if self._server is None or self._stepper is None:
            return
        self._stepper.cancel()
        await asyncio.gather(self._stepper, return_exceptions=True)
        self.break_links()
        await self._server.stop(None)
        self._server = None

    def break_links(self) -> None:
        for link in self._links:
            link.broken.set()

    async def set_serving(self, serving: bool) -> None:
        self._serving = serving
        for link in self._links:
            link.outbox.put_nowait(attention_pb2.LinkResponse(load=self._load(link)))

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait for something that a message to this server brings about."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    async def Link(
        self, request_iterator: AsyncIterator[attention_pb2.LinkRequest], context: Context
    ) -> AsyncIterator[attention_pb2.LinkResponse]:
        link = _Link()
        self._links.append(link)
        reader = asyncio.create_task(self._read(link, request_iterator))
        broken = asyncio.create_task(link.broken.wait())
        try:
            while True:
                item = asyncio.create_task(link.outbox.get())
                await asyncio.wait({item, broken, reader}, return_when=asyncio.FIRST_COMPLETED)
                if item.done():
                    yield item.result()
                    continue
                item.cancel()
                if broken.done():
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server dies")
                return
        finally:
            reader.cancel()
            broken.cancel()
            self._links.remove(link)
            await self._notify()

    async def _read(self, link: _Link, requests: AsyncIterator[attention_pb2.LinkRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "hello":
                    self.hellos.append(request.hello)
                    link.takes_columns = request.hello.takes_columns and self._makes_columns
                    link.outbox.put_nowait(attention_pb2.LinkResponse(load=self._load(link)))
                case "submit":
                    self._on_submit(link, request.submit)
                case "abort":
                    self.aborts.append(request.abort.handle)
                    link.running.pop(request.abort.handle, None)
            await self._notify()

    def _on_submit(self, link: _Link, submit: attention_pb2.Submit) -> None:
        self.submits.append(submit)
        if self.refusal is not None:
            code, message = self.refusal
            delta = attention_pb2.TokenDelta(handle=submit.handle, status_code=code.value[0], error_message=message)
            link.outbox.put_nowait(attention_pb2.LinkResponse(deltas=[delta]))
            return
        link.running[submit.handle] = submit
        link.emitted[submit.handle] = len(submit.output_token_ids)
        self._work.set()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _step_for_ever(self) -> None:
        while True:
            await self._work.wait()
            await self.going.wait()
            self.step()
            await self._notify()
            await asyncio.sleep(0)
            if not any(link.running and not link.broken.is_set() for link in self._links):
                self._work.clear()

    def step(self) -> None:
        """One step of every running sequence."""
        for link in self._links:
            if link.broken.is_set():
                continue
            response = attention_pb2.LinkResponse(load=self._load(link))
            for delta in [self._advance(link, handle) for handle in list(link.running)]:
                if link.takes_columns and not (delta.logprobs or delta.finish_reason):
                    response.handles.extend([delta.handle] * len(delta.token_ids))
                    response.token_ids.extend(delta.token_ids)
                else:
                    response.deltas.append(delta)
            if response.deltas or response.handles:
                link.outbox.put_nowait(response)
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self._steps_left = None
                self.break_links()

    def _advance(self, link: _Link, handle: int) -> attention_pb2.TokenDelta:
        submit, position = link.running[handle], link.emitted[handle]
        params = submit.sampling_params
        delta = attention_pb2.TokenDelta(handle=handle)
        for _ in range(self._tokens_per_step):
            token_id = self._script(submit, position)
            position += 1
            delta.token_ids.append(token_id)
            if params.HasField("logprobs"):
                top = [generate_pb2.TopLogprob(token_id=rank, logprob=-float(rank)) for rank in range(params.logprobs)]
                delta.logprobs.append(generate_pb2.TokenLogprob(token_id=token_id, logprob=-1.0, top_logprobs=top))
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else submit.eos_token_ids)}
            if token_id in stops and position > params.min_tokens:
                delta.finish_reason = generate_pb2.FINISH_REASON_STOP
                delta.matched_token_id = token_id
                break
            if position >= params.max_tokens:
                delta.finish_reason = generate_pb2.FINISH_REASON_LENGTH
                break
        link.emitted[handle] = position
        if delta.finish_reason:
            del link.running[handle]
        return delta

    def _load(self, link: _Link) -> attention_pb2.AttentionLoad:
        return attention_pb2.AttentionLoad(serving=self._serving, num_requests_running=len(link.running))


class FakeBalancer(mesh_pb2_grpc.MembershipServiceServicer):
    """Tells every router the last view or pause it was given."""

    def __init__(self) -> None:
        self.address = ""
        self.registrations: list[mesh_pb2.Registration] = []
        self.leaving: list[str] = []
        self._number = 0
        self._last: mesh_pb2.JoinResponse | None = None
        self._outboxes: list[asyncio.Queue[mesh_pb2.JoinResponse]] = []
        self._server: grpc.aio.Server | None = None

    async def start(self) -> FakeBalancer:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        mesh_pb2_grpc.add_MembershipServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def publish(self, servers: Sequence[FakeAttention], traceparent: str = "") -> None:
        """The next view: these attention servers and one expert server."""
        self._number += 1
        ranks = [
            mesh_pb2.Rank(
                rank=rank,
                server_id=server.server_id,
                incarnation=server.incarnation,
                role=mesh_pb2.ROLE_ATTENTION,
                grpc_address=server.address,
            )
            for rank, server in enumerate(servers)
        ]
        ranks.append(mesh_pb2.Rank(rank=len(ranks), server_id="expert-0", role=mesh_pb2.ROLE_EXPERT))
        self._send(mesh_pb2.JoinResponse(view=mesh_pb2.View(number=self._number, ranks=ranks, traceparent=traceparent)))

    def pause(self, reason: str) -> None:
        self._send(mesh_pb2.JoinResponse(pause=mesh_pb2.Pause(reason=reason)))

    def drain(self, reason: str) -> None:
        for outbox in self._outboxes:
            outbox.put_nowait(mesh_pb2.JoinResponse(drain=mesh_pb2.Drain(reason=reason)))

    def _send(self, message: mesh_pb2.JoinResponse) -> None:
        self._last = message
        for outbox in self._outboxes:
            outbox.put_nowait(message)

    async def Join(
        self, request_iterator: AsyncIterator[mesh_pb2.JoinRequest], context: Context
    ) -> AsyncIterator[mesh_pb2.JoinResponse]:
        outbox: asyncio.Queue[mesh_pb2.JoinResponse] = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator))
        self._outboxes.append(outbox)
        try:
            yield mesh_pb2.JoinResponse(welcome=mesh_pb2.Welcome(mesh_id="fake", heartbeat_s=0.5, lease_s=3))
            if self._last is not None:
                yield self._last
            while True:
                yield await outbox.get()
        finally:
            reader.cancel()
            self._outboxes.remove(outbox)

    async def _read(self, requests: AsyncIterator[mesh_pb2.JoinRequest]) -> None:
        async for request in requests:
            if request.HasField("registration"):
                self.registrations.append(request.registration)
            elif request.HasField("leaving"):
                self.leaving.append(request.leaving.reason)
