"""Links over real gRPC on loopback, with a half that steps on a thread of the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.attention_server.link import RouterLink as ServiceLink
from expertmesh.attention_server.link import take_response
from expertmesh.attention_server.outputs import Output
from expertmesh.attention_server.sampler import Logprobs
from expertmesh.attention_server.server import AttentionServer
from expertmesh.mesh.config import AttentionConfig, MeshConfig, ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.v1 import attention_pb2, attention_pb2_grpc, generate_pb2
from support.attention import PlainExperts, one_torch_thread
from support.checkpoints import write_checkpoint

TIMEOUT_S = 20.0


class RouterLink:
    """A router's end of a link; ``load`` is the last one told."""

    def __init__(self, call: grpc.aio.StreamStreamCall[attention_pb2.LinkRequest, attention_pb2.LinkResponse]) -> None:
        self.write = call.write
        self.cancel = call.cancel
        self._call = call
        self.load = attention_pb2.AttentionLoad()

    async def read(self) -> attention_pb2.LinkResponse | None:
        """The next message, None at the end of the stream."""
        message = await asyncio.wait_for(self._call.read(), TIMEOUT_S)
        if not isinstance(message, attention_pb2.LinkResponse):
            return None
        self.load = message.load if message.HasField("load") else self.load
        return message

    async def deltas_until_end(self, *handles: int) -> dict[int, list[attention_pb2.TokenDelta]]:
        deltas: dict[int, list[attention_pb2.TokenDelta]] = {handle: [] for handle in handles}
        open_handles = set(handles)
        while open_handles:
            message = await self.read()
            assert message is not None, f"the stream ended before {open_handles}"
            for delta in message.deltas:
                deltas[delta.handle].append(delta)
                if delta.finish_reason or delta.status_code:
                    open_handles.remove(delta.handle)
        return deltas

    async def load_until(self, **expected: object) -> None:
        while any(getattr(self.load, name) != value for name, value in expected.items()):
            assert await self.read() is not None, f"the stream ended before {expected}"


class Stepper:
    """The step thread of a rank that has everything itself."""

    def __init__(self, server: AttentionServer, experts: PlainExperts, moe_layers: tuple[int, ...]) -> None:
        self._server = server
        self._experts = experts
        self._layers = moe_layers
        self._work = threading.Event()
        self._stopping = False
        server.half.set_waker(self._work.set)
        self._thread = threading.Thread(target=self._run, name="step")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._work.set()
        if self._thread.ident is not None:
            self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        half = self._server.half
        while not self._stopping:
            self._work.clear()
            if half.prepare():
                (batch,) = half.micro_batches
                batch.begin()
                for layer in self._layers:
                    x_TH, routes = batch.before_experts(layer)
                    batch.while_dispatched(layer)
                    batch.after_experts(layer, self._experts.compute(layer, x_TH, routes))
                half.finish()
            else:
                self._work.wait(TIMEOUT_S)


class Rig:
    """A served attention server; ``link`` opens a router's stream."""

    def __init__(self, path: Path, **attention: Any) -> None:
        config = MeshConfig(model=ModelConfig(path=path), attention=AttentionConfig(**attention))
        self.spec = load_spec(config.model)
        checkpoint = Checkpoint(path)
        self.server = AttentionServer(config, self.spec, checkpoint, disabled_telemetry())
        self.stepper = Stepper(self.server, PlainExperts(self.spec, checkpoint), self.spec.moe_layers)
        self.address = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Rig]:
        grpc_server = grpc.aio.server()
        assert self.server.register(grpc_server) == ["expertmesh.v1.AttentionService"]
        self.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        await grpc_server.start()
        await self.server.start()
        try:
            yield self
        finally:
            await self.server.stop()
            await grpc_server.stop(5)
            await asyncio.to_thread(self.stepper.stop)

    @asynccontextmanager
    async def link(self, fingerprint: str | None = None, *, takes_columns: bool = False) -> AsyncIterator[RouterLink]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = attention_pb2_grpc.AttentionServiceStub(channel).Link(timeout=TIMEOUT_S)
            hello = attention_pb2.LinkHello(
                router_id="router-0",
                fingerprint=self.spec.fingerprint if fingerprint is None else fingerprint,
                takes_columns=takes_columns,
            )
            await call.write(attention_pb2.LinkRequest(hello=hello))
            try:
                yield RouterLink(call)
            finally:
                call.cancel()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with one_torch_thread():
        yield write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def submit(handle: int, prompt: list[int], **fields: Any) -> attention_pb2.LinkRequest:
    options = fields.pop("sampling_params", {"max_tokens": 8})
    message = attention_pb2.Submit(
        handle=handle,
        request_id=f"r{handle}",
        prompt_token_ids=prompt,
        sampling_params=generate_pb2.SamplingParams(**options),
        **fields,
    )
    return attention_pb2.LinkRequest(submit=message)


async def test_tokens_of_several_sequences_come_with_the_load(path: Path) -> None:
    async with Rig(path).serve() as rig, rig.link() as call:
        await call.read()
        assert call.load.num_kv_blocks > 0
        assert not call.load.serving
        rig.server.half.set_serving(True)
        await call.load_until(serving=True)
        rig.stepper.start()
        for handle in (1, 2):
            await call.write(submit(handle, [handle, 5], sampling_params={"max_tokens": 8, "logprobs": 1}))
        deltas = await call.deltas_until_end(1, 2)
        for handle in (1, 2):
            assert sum(len(delta.token_ids) for delta in deltas[handle]) == 8
            assert deltas[handle][-1].finish_reason == generate_pb2.FINISH_REASON_LENGTH
            assert deltas[handle][0].logprobs[0].top_logprobs[0].token_id == deltas[handle][0].token_ids[0]
        await call.load_until(num_requests_running=0, kv_cache_usage=0.0, outstanding_tokens=0)


async def test_columns_hold_the_same_tokens(path: Path) -> None:
    prompt, sampling = [7, 8, 9], {"max_tokens": 12}
    async with Rig(path).serve() as rig:
        rig.stepper.start()
        async with rig.link() as link:
            await link.write(submit(1, prompt, sampling_params=sampling))
            expected = [token for delta in (await link.deltas_until_end(1))[1] for token in delta.token_ids]
        async with rig.link(takes_columns=True) as link:
            await link.write(submit(5, prompt, sampling_params=sampling))
            columns: list[int] = []
            while True:
                message = await link.read()
                assert message is not None
                assert set(message.handles) <= {5}
                columns += message.token_ids
                if message.deltas:
                    break
    (last,) = message.deltas
    assert last.finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert (len(columns), [*columns, *last.token_ids]) == (11, expected)


def test_what_follows_a_delta_of_its_sequence_stays_behind_it() -> None:
    """As when a router's link is some steps behind."""
    length = generate_pb2.FINISH_REASON_LENGTH
    link = ServiceLink(1, "router-0", takes_columns=True)
    link.outputs = [
        Output(1, 1, 10, cached_tokens=16),
        Output(1, 2, 20),
        Output(1, 1, 11),
        Output(1, 2, 21),
        Output(1, 3, 30, logprobs=Logprobs(-1.0, [], [])),
        Output(1, 2, 22, finish=length),
        Output(1, 4, code=grpc.StatusCode.UNAVAILABLE, message="it stops"),
        Output(1, 3, 31),
    ]
    message = take_response(link, None, 1)
    assert message is not None
    assert list(zip(message.handles, message.token_ids, strict=True)) == [(2, 20), (2, 21)]
    deltas = [(delta.handle, list(delta.token_ids)) for delta in message.deltas]
    assert deltas == [(1, [10]), (1, [11]), (3, [30]), (2, [22]), (4, []), (3, [31])]
    assert take_response(link, None, 1) is None


@pytest.mark.slow  # a load is told twice a second
async def test_routers_hear_how_many_they_are(path: Path) -> None:
    """Also while there is nothing to do."""
    async with Rig(path).serve() as rig, rig.link() as first:
        await first.load_until(num_routers=1)
        async with rig.link() as second:
            await second.load_until(num_routers=2)
            await first.load_until(num_routers=2)
        await first.load_until(num_routers=1)


async def test_other_model_is_refused(path: Path) -> None:
    async with Rig(path).serve() as rig, rig.link(fingerprint="other") as call:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "same model" in str(failed.value.details())


async def test_link_must_begin_with_hello(path: Path) -> None:
    async with Rig(path).serve() as rig, grpc.aio.insecure_channel(rig.address) as channel:
        call = RouterLink(attention_pb2_grpc.AttentionServiceStub(channel).Link(timeout=TIMEOUT_S))
        await call.write(submit(1, [1]))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("request_message", "code", "message"),
    [
        (submit(1, []), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        (submit(1, [4000]), grpc.StatusCode.INVALID_ARGUMENT, "ids go from 0 to 511"),
        (submit(1, [1] * 256), grpc.StatusCode.INVALID_ARGUMENT, "max_model_len 256"),
        (submit(1, [1] * 100), grpc.StatusCode.RESOURCE_EXHAUSTED, "never fit into the KV cache of 64"),
    ],
)
async def test_bad_request_ends_alone(
    path: Path, request_message: attention_pb2.LinkRequest, code: grpc.StatusCode, message: str
) -> None:
    async with Rig(path, num_kv_blocks=4).serve() as rig, rig.link() as call:
        rig.stepper.start()
        await call.write(request_message)
        (delta,) = (await call.deltas_until_end(1))[1]
        assert delta.status_code == code.value[0]
        assert message in delta.error_message
        await call.write(submit(2, [1, 2, 3]))
        assert len((await call.deltas_until_end(2))[2]) == 8


@pytest.mark.slow
async def test_full_queue_and_abort(path: Path) -> None:
    async with Rig(path, max_waiting=1).serve() as rig, rig.link() as call:
        await call.write(submit(1, [1]))
        await call.write(submit(2, [1]))
        (delta,) = (await call.deltas_until_end(2))[2]
        assert delta.status_code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        await call.write(attention_pb2.LinkRequest(abort=attention_pb2.AbortSequence(handle=1)))
        await call.load_until(num_requests_waiting=0)


@pytest.mark.slow
async def test_broken_link_gives_its_blocks_back(path: Path) -> None:
    async with Rig(path).serve() as rig, rig.link() as watcher:
        rig.server.half.set_serving(True)
        async with rig.link() as call:
            await call.write(submit(1, [1] * 40, sampling_params={"max_tokens": 200}))
            await watcher.load_until(num_requests_waiting=1)
            await asyncio.to_thread(rig.server.half.prepare)
            await watcher.load_until(num_requests_running=1)
        rig.stepper.start()
        await watcher.load_until(num_requests_running=0, kv_cache_usage=0.0)


@pytest.mark.slow
async def test_deadline_without_a_step(path: Path) -> None:
    async with Rig(path).serve() as rig, rig.link() as call:
        await call.write(submit(1, [1], timeout_s=0.01))
        (delta,) = (await call.deltas_until_end(1))[1]
        assert delta.status_code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


@pytest.mark.slow
async def test_drain_refuses_what_is_new_and_waits_for_what_runs(path: Path) -> None:
    async with Rig(path).serve() as rig, rig.link() as call:
        rig.stepper.start()
        await call.write(submit(1, [1, 2], sampling_params={"max_tokens": 100}))
        await call.load_until(num_requests_running=1)
        await asyncio.wait_for(rig.server.drain(TIMEOUT_S), TIMEOUT_S)
        await call.write(submit(2, [1]))
        deltas = await call.deltas_until_end(1, 2)
        assert deltas[1][-1].finish_reason == generate_pb2.FINISH_REASON_LENGTH
        assert deltas[2][0].status_code == grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.mark.slow
async def test_stop_ends_what_still_runs(path: Path) -> None:
    async with Rig(path).serve() as rig, rig.link() as call:
        await call.write(submit(1, [1, 2]))
        await call.load_until(num_requests_waiting=1)
        await rig.server.drain(0.0)
        await rig.server.stop()
        (delta,) = (await call.deltas_until_end(1))[1]
        assert delta.status_code == grpc.StatusCode.UNAVAILABLE.value[0]
        assert await call.read() is None
