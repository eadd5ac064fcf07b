"""Servers and channels over loopback sockets."""

from __future__ import annotations

import asyncio
import gc
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc import join_host_port, open_channel
from expertmesh.mesh.telemetry import Metrics, Telemetry, disabled_telemetry
from support.rpc_stand import (
    NO_TLS,
    NOT_SERVING,
    SERVICE,
    SERVICE_UNKNOWN,
    SERVING,
    Behaviours,
    calling,
    failure,
    health_of,
    running,
)


async def test_health_of_the_server_and_of_each_service() -> None:
    async with running() as server, open_channel(server.address, NO_TLS) as channel:
        assert await health_of(channel) == await health_of(channel, SERVICE) == NOT_SERVING
        server.set_serving(True)
        assert await health_of(channel) == await health_of(channel, SERVICE) == SERVING
        server.set_serving(False)
        assert await health_of(channel) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health_of(channel, "no.such")
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=10)
        assert set(listed.statuses) == {"", SERVICE}


async def test_health_watchers_see_changes_and_do_not_delay_the_stop() -> None:
    async with running() as server, open_channel(server.address, NO_TLS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="no.such"), timeout=30)
        assert (await watch.read()).status == NOT_SERVING
        assert (await unknown.read()).status == SERVICE_UNKNOWN
        server.set_serving(True)
        assert (await watch.read()).status == SERVING
        started = time.monotonic()
        await server.stop(20)
        assert time.monotonic() - started < 10
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is await unknown.read() is grpc.aio.EOF
        server.set_serving(True)  # too late, and no error


async def test_reflection_lists_every_service() -> None:
    async with running() as server, open_channel(server.address, NO_TLS) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
        names = {service.name for service in (await call.read()).list_services_response.service}
        call.cancel()
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
async def test_a_port_in_use_names_the_key_and_the_reason(host: str) -> None:
    async with running(host=host) as server:
        assert server.address.startswith("[::1]:" if host == "::1" else f"{host}:")
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(UserError, match=r"router\.port: .*in use"):
            async with running(host=host, port=port, key="router.port"):
                raise AssertionError


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=r"router\.port: .*cannot be bound"):
        async with running(host=host, key="router.port"):
            raise AssertionError


def test_join_host_port() -> None:
    assert join_host_port("127.0.0.1", 1) == "127.0.0.1:1"
    assert join_host_port("::1", 1) == join_host_port("[::1]", 1) == "[::1]:1"


async def test_each_kind_of_handler_passes_the_guard() -> None:
    async with running() as server, open_channel(server.address, NO_TLS) as channel:
        assert await calling(channel.unary_unary, "Echo")(b"a", timeout=10) == b"a"
        assert [part async for part in calling(channel.unary_stream, "WriteEcho")(b"a", timeout=10)] == [b"a", b"a"]
        assert await calling(channel.stream_unary, "SumRequests")(iter([b"a", b"b"]), timeout=10) == b"ab"
        echoed = calling(channel.stream_stream, "StreamEcho")(iter([b"a", b"b"]), timeout=10)
        assert [part async for part in echoed] == [b"a", b"b"]


async def test_an_unforeseen_error_is_internal_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry(disabled_telemetry().tracer, Metrics())
    async with running(telemetry=telemetry) as server, open_channel(server.address, NO_TLS) as channel:
        code, details = await failure(calling(channel.unary_unary, "Crash")(b"", timeout=10))
        assert code == grpc.StatusCode.INTERNAL
        assert "RuntimeError" in details
        assert "secret" not in details
        stream = calling(channel.unary_stream, "StreamCrash")(b"", timeout=10)
        assert await stream.read() == b"first"
        assert (await failure(stream.read()))[0] == grpc.StatusCode.INTERNAL
    assert caplog.text.count("RuntimeError: secret detail") == 2
    assert telemetry.metrics.rpc_internal_errors.labels(method=f"/{SERVICE}/Crash").read() == 1
    assert telemetry.metrics.rpc_internal_errors.labels(method=f"/{SERVICE}/StreamCrash").read() == 1


async def test_chosen_statuses_pass_and_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server, open_channel(server.address, NO_TLS) as channel:
        refused = await failure(calling(channel.unary_unary, "Refuse")(b"", timeout=10))
        assert refused == (grpc.StatusCode.INVALID_ARGUMENT, "set x to 1")
        missing = await failure(calling(channel.unary_unary, "NoSuch")(b"", timeout=10))
        assert missing[0] == grpc.StatusCode.UNIMPLEMENTED
    assert not caplog.records


async def test_a_client_that_leaves_ends_its_handlers() -> None:
    behaviours = Behaviours()
    async with running(behaviours) as server, open_channel(server.address, NO_TLS) as channel:
        call = calling(channel.unary_unary, "Hang")(b"")
        stream = calling(channel.unary_stream, "StreamHang")(b"")
        assert await stream.read() == b"first"
        await asyncio.wait_for(behaviours.entered.wait(), 10)
        call.cancel()
        stream.cancel()
        await asyncio.wait_for(asyncio.gather(behaviours.cancelled.wait(), behaviours.closed.wait()), 10)


async def test_a_stream_is_closed_by_its_own_call_not_by_the_garbage_collector(
    caplog: pytest.LogCaptureFixture,
) -> None:
    behaviours = Behaviours()
    gc.disable()  # a generator that gRPC dropped in mid-write would be closed only by it, on a call that is gone
    try:
        async with running(behaviours) as server, open_channel(server.address, NO_TLS) as channel:
            call = calling(channel.unary_stream, "StreamFlood")(b"")
            assert await call.read()
            call.cancel()
            async with asyncio.timeout(10):
                await behaviours.closed.wait()
    finally:
        gc.enable()
    assert "StreamFlood failed" in caplog.text


async def test_stop_waits_for_the_grace_and_then_cancels() -> None:
    behaviours = Behaviours()
    async with running(behaviours) as server, open_channel(server.address, NO_TLS) as channel:
        call = calling(channel.unary_unary, "Hang")(b"", timeout=30)
        await asyncio.wait_for(behaviours.entered.wait(), 10)
        await server.stop(0.05)
        await asyncio.wait_for(behaviours.cancelled.wait(), 10)
        assert (await failure(call))[0] == grpc.StatusCode.UNAVAILABLE


async def test_limits_on_messages_and_calls() -> None:
    behaviours = Behaviours()
    async with (
        running(behaviours, max_message_bytes=1000, max_concurrent_rpcs=1) as server,
        open_channel(server.address, NO_TLS) as channel,
    ):
        echo = calling(channel.unary_unary, "Echo")
        assert (await failure(echo(bytes(2000), timeout=10)))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        hanging = calling(channel.unary_unary, "Hang")(b"", timeout=30)
        await asyncio.wait_for(behaviours.entered.wait(), 10)
        assert (await failure(echo(b"", timeout=10)))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        hanging.cancel()


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    async with running() as server, open_channel(server.address, NO_TLS) as channel:
        assert await health_of(channel) == NOT_SERVING


@pytest.mark.slow
async def test_a_channel_finds_a_restarted_server_within_seconds() -> None:
    async with running() as first, open_channel(first.address, NO_TLS) as channel:
        assert await health_of(channel) == NOT_SERVING
        await first.stop(0)
        assert (await failure(health_of(channel)))[0] == grpc.StatusCode.UNAVAILABLE
        async with running(port=int(first.address.rpartition(":")[2])) as second:
            second.set_serving(True)
            stub = health_pb2_grpc.HealthStub(channel)
            response = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=10)
            assert response.status == SERVING


class Relay:
    """Passes bytes on until ``freeze``: from then on it reads and passes nothing, as a dead network does."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        self._flowing.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._tasks += [
            asyncio.create_task(self._pump(reader, far_writer)),
            asyncio.create_task(self._pump(far_reader, writer)),
        ]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@pytest.mark.slow
async def test_a_silent_peer_is_noticed_by_both_sides() -> None:
    behaviours = Behaviours()
    quick = (("grpc.keepalive_time_ms", 300), ("grpc.http2.ping_timeout_ms", 1000))
    async with running(behaviours, options=quick) as server:
        relay = Relay(server.address)
        async with relay as address, open_channel(address, NO_TLS, options=quick) as channel:
            call = calling(channel.unary_unary, "Hang")(b"", timeout=60)
            await asyncio.wait_for(behaviours.entered.wait(), 10)
            relay.freeze()
            assert (await failure(asyncio.wait_for(call, 20)))[0] == grpc.StatusCode.UNAVAILABLE
            await asyncio.wait_for(behaviours.cancelled.wait(), 20)


@pytest.mark.slow
async def test_frequent_pings_are_not_answered_with_goaway() -> None:
    behaviours = Behaviours()
    # gRPC waits a second between pings at least, and a server with its own defaults gives up at the third or fourth.
    quick = (("grpc.keepalive_time_ms", 20),)
    async with running(behaviours) as server, open_channel(server.address, NO_TLS, options=quick) as channel:
        call = calling(channel.unary_unary, "Hang")(b"", timeout=4.5)
        assert (await failure(call))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
