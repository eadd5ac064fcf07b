"""AttentionService: the links from routers. Everything here runs on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from expertmesh.attention_server.constraint import ConstraintCompiler
from expertmesh.attention_server.engine import Engine
from expertmesh.attention_server.events import Abort, Unlink
from expertmesh.attention_server.fetching import Fetching
from expertmesh.attention_server.kv_transport import KvSource
from expertmesh.attention_server.link import RouterLink, take_response
from expertmesh.attention_server.outputs import Load, Output
from expertmesh.attention_server.request import RefusedError, Sequence, parse_submit
from expertmesh.attention_server.tracing import trace_request
from expertmesh.mesh.constraint import Constraint, constraint_of
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.v1 import attention_pb2, attention_pb2_grpc

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0
LinkContext = grpc.aio.ServicerContext[
    AsyncIterator[attention_pb2.LinkRequest], AsyncIterator[attention_pb2.LinkResponse]
]


class AttentionService(attention_pb2_grpc.AttentionServiceServicer):
    """Moves requests from links to the engine and outputs back."""

    def __init__(self, engine: Engine, spec: ModelSpec, telemetry: Telemetry) -> None:
        self._engine = engine
        self._spec = spec
        self._telemetry = telemetry
        self.fetching: Fetching | None = None
        """Where KV blocks of prompts may come from elsewhere."""
        self.kv_source: KvSource | None = None
        """What routers are told of ours."""
        self._links: dict[int, RouterLink] = {}
        self._numbers = itertools.count(1)
        self._constraints = ConstraintCompiler(spec.path / "tokenizer.json", spec.vocab_size, spec.eos_token_ids)
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="constraint")
        self._compiling: dict[tuple[int, int], asyncio.Task[None]] = {}  # by link and handle
        self.draining = False
        self.changed = asyncio.Event()
        """Set whenever the engine published something."""

    def deliver(self, outputs: list[Output], load: Load) -> None:
        """Give a step's outputs to their links; a link that is gone has no reader, and its sequences are aborted."""
        for output in outputs:
            link = self._links.get(output.link)
            if link is not None:
                link.outputs.append(output)
        for link in self._links.values():
            told = link.load or link.sent_load
            if link.outputs or told is None or told.serving != load.serving:
                link.load = load
                link.changed.set()
        self.changed.set()

    def announce(self, load: Load) -> None:
        """Tell every link about a load that it does not know yet."""
        for link in self._links.values():
            if link.sent_load != load or link.told_routers != len(self._links):
                link.load = load
                link.changed.set()

    def close(self) -> None:
        """End all links after what waits for them. Constraints that compile are given up."""
        for task in self._compiling.values():
            task.cancel()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        for link in self._links.values():
            link.closed = True
            link.changed.set()

    async def Link(
        self, request_iterator: AsyncIterator[attention_pb2.LinkRequest], context: LinkContext
    ) -> AsyncIterator[attention_pb2.LinkResponse]:
        hello = await self._hello(request_iterator, context)
        link = RouterLink(next(self._numbers), hello.router_id, hello.takes_columns)
        self._links[link.number] = link
        log.info("router %s linked", link.router_id)
        reader = asyncio.create_task(self._read(request_iterator, link), name=f"link {link.router_id}")

        def ended(_: LinkContext) -> None:
            # A call may die while the generator is suspended in a yield; gRPC then leaves it to the garbage collector.
            reader.cancel()
            self._unlink(link)

        context.add_done_callback(ended)  # type: ignore[arg-type]  # the stubs declare a class where they mean a protocol
        try:
            link.load = self._engine.load()
            link.changed.set()
            while not (link.closed and not link.outputs):
                await link.changed.wait()  # bounded by the life of the call
                link.changed.clear()
                response = take_response(link, self.kv_source, len(self._links))
                if response is not None:
                    yield response
        finally:
            self._unlink(link)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _hello(
        self, request_iterator: AsyncIterator[attention_pb2.LinkRequest], context: LinkContext
    ) -> attention_pb2.LinkHello:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(request_iterator, None)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {_HELLO_TIMEOUT_S:g} s")
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message on a link must be hello")
        if first.hello.fingerprint != self._spec.fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this server serves {self._spec.name} with fingerprint {self._spec.fingerprint}, the router has "
                f"{first.hello.fingerprint}: give all services the same model and model.dtype",
            )
        return first.hello

    async def _read(self, request_iterator: AsyncIterator[attention_pb2.LinkRequest], link: RouterLink) -> None:
        """Until the router ends its side of the stream, which ends the link."""
        try:
            async for message in request_iterator:
                kind = message.WhichOneof("message")
                if kind == "submit":
                    self._submit(message.submit, link)
                elif kind == "abort":
                    self._abort(message.abort.handle, link)
                else:
                    log.warning("router %s sent %s on a link that is set up", link.router_id, kind or "nothing")
        finally:
            link.closed = True
            link.changed.set()

    def _submit(self, submit: attention_pb2.Submit, link: RouterLink) -> None:
        try:
            if self.draining:
                raise RefusedError(grpc.StatusCode.UNAVAILABLE, "this attention server is draining")
            sequence = parse_submit(
                submit,
                link=link.number,
                now_s=time.monotonic(),
                vocab_size=self._spec.vocab_size,
                max_model_len=self._spec.max_model_len,
            )
        except RefusedError as refusal:
            _answer_refused(link, submit.handle, refusal)
            return
        sequence.trace = trace_request(self._telemetry, submit, model=self._spec.name)
        constraint = constraint_of(submit.sampling_params)
        if constraint is None:
            self._admit(sequence, submit)
            return
        compiling = self._constrain(sequence, link, constraint, submit)
        key = (link.number, submit.handle)
        task = self._compiling[key] = asyncio.create_task(compiling, name=f"constraint of {submit.request_id}")
        task.add_done_callback(functools.partial(self._compiled, link, sequence))

    def _compiled(self, link: RouterLink, sequence: Sequence, task: asyncio.Task[None]) -> None:
        del self._compiling[(link.number, sequence.handle)]
        if task.cancelled():
            if sequence.trace is not None:
                sequence.trace.refused("aborted while its constraint was compiled")
        elif task.exception() is not None:
            log.error("a constraint could not be compiled", exc_info=task.exception())
            _refuse(link, sequence, RefusedError(grpc.StatusCode.INTERNAL, "the constraint could not be compiled"))

    async def _constrain(
        self, sequence: Sequence, link: RouterLink, constraint: Constraint, submit: attention_pb2.Submit
    ) -> None:
        """Admit the sequence once its constraint is compiled: milliseconds that no step waits for, a second at most."""
        output = sequence.tokens[sequence.num_prompt : sequence.num_tokens].tolist()
        make = functools.partial(
            self._constraints.matcher, constraint, output, ignore_eos=submit.sampling_params.ignore_eos
        )
        try:
            sequence.matcher = await asyncio.get_running_loop().run_in_executor(self._compiler, make)
            if self.draining:
                raise RefusedError(grpc.StatusCode.UNAVAILABLE, "this attention server is draining")
        except RefusedError as refusal:
            _refuse(link, sequence, refusal)
            return
        if sequence.trace is not None:
            sequence.trace.prepared("constraint", {"expertmesh.constraint": constraint.kind})
        self._admit(sequence, submit)

    def _admit(self, sequence: Sequence, submit: attention_pb2.Submit) -> None:
        if self.fetching is not None and submit.HasField("kv_source"):
            source = submit.kv_source
            self.fetching.start(sequence, KvSource(source.address, source.ticket, source.nixl_digest))
        else:
            self._engine.post(sequence)

    def _abort(self, handle: int, link: RouterLink) -> None:
        compiling = self._compiling.get((link.number, handle))
        if compiling is not None:
            compiling.cancel()
        elif self.fetching is None or not self.fetching.abort(link.number, handle):
            self._engine.post(Abort(link.number, handle))

    def _unlink(self, link: RouterLink) -> None:
        if self._links.pop(link.number, None) is not None:
            log.info("router %s unlinked", link.router_id)
            for (number, _), compiling in self._compiling.items():
                if number == link.number:
                    compiling.cancel()
            if self.fetching is not None:
                self.fetching.unlink(link.number)
            self._engine.post(Unlink(link.number))


def _refuse(link: RouterLink, sequence: Sequence, refusal: RefusedError) -> None:
    """A sequence that the engine has not heard of."""
    if sequence.trace is not None:
        sequence.trace.refused(str(refusal))
    _answer_refused(link, sequence.handle, refusal)


def _answer_refused(link: RouterLink, handle: int, refusal: RefusedError) -> None:
    link.outputs.append(Output(link.number, handle, code=refusal.code, message=str(refusal)))
    link.changed.set()
