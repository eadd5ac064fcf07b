"""Balancers that share a real etcd, in this process; servers are raw streams. Meshes of processes: ``tests/chaos``."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aetcd.rpc
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.balancer.election import Election
from expertmesh.balancer.etcd import EtcdClient, connected
from expertmesh.balancer.keyvalue import Guard, UnreachableError
from expertmesh.balancer.standby import LEADER_KEY
from expertmesh.balancer.state import fresh_state
from expertmesh.balancer.state_etcd import EtcdState
from expertmesh.mesh import rpc
from expertmesh.mesh.config import EtcdConfig, MeshConfig, TlsConfig
from expertmesh.mesh.config_security import ETCD_PASSWORD_VARIABLE
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.balancer_parts import registration
from support.balancer_stand import TIMEOUT_S, Stream, balancer, cli, config, join, wait_serving
from support.etcd import EtcdProcess, free_ports, why_not
from support.mesh_state import until

pytestmark = pytest.mark.slow

LEASE_S = 2.0


def shared(tmp_path: Path, etcd: EtcdProcess, **settings: Any) -> MeshConfig:
    """Of one mesh a test, since its keys are below the test's own folder."""
    section = {"endpoints": [etcd.endpoint], "prefix": f"/{tmp_path.name}", **settings}
    return config(tmp_path, state="etcd", etcd=section)


def client_of(etcd: EtcdProcess, **settings: Any) -> EtcdConfig:
    return EtcdConfig(endpoints=(etcd.endpoint,), **settings)


async def refusal(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    return caught.value


async def until_it_leads(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def serves() -> bool:
        request = health_pb2.HealthCheckRequest(service="")
        answer = await stub.Check(request, timeout=TIMEOUT_S, wait_for_ready=True)  # it may be between two turns
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    await until(serves, TIMEOUT_S, lambda: "it does not lead", 0.01)


async def test_the_one_that_stands_by_refuses_with_the_leaders_address_and_takes_over_at_once_when_that_one_stops(
    tmp_path: Path, etcd: EtcdProcess
) -> None:
    settings = shared(tmp_path, etcd)
    first = balancer(settings, "one")
    one = await first.__aenter__()
    try:
        async with rpc.open_channel(one, TlsConfig()) as channel:
            await until_it_leads(channel)  # before there is another one that could
        async with balancer(settings, "two") as two, rpc.open_channel(two, TlsConfig()) as standby:
            async with rpc.open_channel(one, TlsConfig()) as channel:
                streams = await join(channel, "a1", "e1", "e2")
                views = {server_id: await stream.next_view() for server_id, stream in streams.items()}
                before = await wait_serving(channel, 1)

                async def knows_the_leader() -> bool:
                    return "leads" in ((await refusal(standby)).details() or "")

                await until(knows_the_leader, TIMEOUT_S, lambda: "the standby knows no leader", 0.01)
                refused = await refusal(standby)
                assert refused.details() == f"two stands by: one at {one} leads"
                assert dict(refused.trailing_metadata() or ())[LEADER_KEY] == one
                stranger = Stream(standby, registration("e3"))
                assert await stranger.ended() == (grpc.StatusCode.UNAVAILABLE, refused.details())
                code, out, err = await cli("status", "--balancer", f"{two},{one}", "--json")
                assert (code, err) == (0, "")
                assert '"view": 1' in out
            stopped_s = time.monotonic()
            await first.__aexit__(None, None, None)
            await until_it_leads(standby)
            took_s = time.monotonic() - stopped_s
            print(f"\nthe next one leads {took_s:.2f} s after the leader was told to stop")
            back = [
                Stream(standby, registration(server_id, view_number=1, view_secret=view.secret, view=view))
                for server_id, view in views.items()
            ]
            for stream in back:
                await stream.register()
            after = await wait_serving(standby, 1, "view_adopted")
            assert after.mesh_id == before.mesh_id
            # The mesh that it took over can change its view, and meets at the new leader's store.
            back[2].cut()
            await back[0].say(view_broken=mesh_pb2.ViewBroken(view_number=1, reason="test", suspects=["e2"]))
            view = await back[0].next_view()
            assert (view.number, [rank.server_id for rank in view.ranks]) == (2, ["a1", "e1"])
            assert view.store_address != views["a1"].store_address
    finally:
        await first.__aexit__(None, None, None)


@pytest.fixture
def late_etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    """One that was never started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    process = EtcdProcess(tmp_path)
    yield process
    process.stop()


async def test_without_etcd_a_balancer_waits_and_says_so(
    tmp_path: Path, late_etcd: EtcdProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "expertmesh.balancer.election")
    async with balancer(shared(tmp_path, late_etcd)) as address, rpc.open_channel(address, TlsConfig()) as channel:

        async def has_said_so() -> bool:
            return "balancer.etcd.endpoints: no answer from 127.0.0.1" in caplog.text

        await until(has_said_so, TIMEOUT_S, lambda: f"it says only: {caplog.text}", 0.01)
        assert "no leader is known" in ((await refusal(channel)).details() or "")
        await asyncio.to_thread(late_etcd.start)
        await until_it_leads(channel)
        told = [record for record in caplog.records if record.name == "expertmesh.balancer.election"]
        assert len(told) == 1, "it says so again and again"


async def test_a_view_that_etcd_does_not_take_is_not_published(tmp_path: Path, etcd: EtcdProcess) -> None:
    """One that only this leader knows could meet another one of the same number."""
    async with balancer(shared(tmp_path, etcd)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        await until_it_leads(channel)
        etcd.signal(signal.SIGSTOP)
        try:
            streams = await join(channel, "a1", "e1", "e2")
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            async for event in admin.ListEvents(admin_pb2.ListEventsRequest(follow=True), timeout=TIMEOUT_S):
                if event.kind == "view_published":
                    break
            for stream in streams.values():
                with pytest.raises(EOFError):  # at the end of its lease it hangs up
                    await stream.next("view")
        finally:
            etcd.signal(signal.SIGCONT)
        await until_it_leads(channel)
        streams = await join(channel, "a1", "e1", "e2", incarnation="2")
        # When it went on, etcd may have taken view 1 after all: then its number is used up.
        assert (await streams["a1"].next_view()).number in (1, 2)


async def test_two_clients_never_both_win_and_a_lease_that_is_not_renewed_ends(etcd: EtcdProcess) -> None:
    async with connected(client_of(etcd)) as one, connected(client_of(etcd)) as two:
        elections = [
            Election(client, key="/race/leader", server_id=name, address="", lease_s=2)
            for name, client in (("one", one), ("two", two))
        ]
        waiting = [asyncio.create_task(election.win()) for election in elections]
        done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
        first = done.pop().result()
        won_s = time.monotonic()
        second = await asyncio.wait_for(pending.pop(), TIMEOUT_S)
        print(f"\nthe second leads {time.monotonic() - won_s:.2f} s after the first was granted its lease")
        assert not first.holds()
        assert second.number > first.number
        assert not await one.transact(first.guard, puts={"/race/state": b"1"})
        assert await two.transact(second.guard, puts={"/race/state": b"2"})


async def test_a_state_of_several_megabytes_is_kept(etcd: EtcdProcess) -> None:
    chance = np.random.default_rng(1)
    view = mesh_pb2.View(number=7)
    for layer in range(60):
        view.placement.add(layer=layer, version=1, slots=chance.integers(0, 256, 16_384).tolist())
    state = replace(fresh_state(), view=view)
    async with connected(client_of(etcd)) as client:
        term = await Election(client, key="/large/leader", server_id="a", address="", lease_s=60).win()
        keeper = EtcdState(client, "/large", term)
        await keeper.save(state)
        assert len(await client.list_keys("/large/state/")) > 1
        assert await keeper.load() == state


@asynccontextmanager
async def admin_of(etcd: EtcdProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
        yield aetcd.rpc.AuthStub(channel)


async def test_a_user_with_a_password_whose_token_etcd_forgets(
    tmp_path: Path, late_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(late_etcd.start)
    made: Any = aetcd.rpc
    async with admin_of(late_etcd) as auth:
        await auth.UserAdd(made.AuthUserAddRequest(name="root", password="secret"), timeout=TIMEOUT_S)
        await auth.UserGrantRole(made.AuthUserGrantRoleRequest(user="root", role="root"), timeout=TIMEOUT_S)
        await auth.AuthEnable(made.AuthEnableRequest(), timeout=TIMEOUT_S)
    with pytest.raises(UserError, match=r"balancer\.etcd\.user: no user is refused by etcd .*password_file"):
        async with balancer(shared(tmp_path, late_etcd)):
            pass
    monkeypatch.setenv(ETCD_PASSWORD_VARIABLE, "wrong")
    with pytest.raises(UserError, match=r"balancer\.etcd\.user: root is refused by etcd .*invalid user ID or password"):
        async with balancer(shared(tmp_path, late_etcd, user="root")):
            pass
    password_file = tmp_path / "password"
    password_file.write_text("secret\n")
    async with connected(client_of(late_etcd, user="root", password_file=password_file)) as client:
        assert await client.transact(Guard(key="/x", create_revision=0), puts={"/x": b"1"})
        await asyncio.to_thread(late_etcd.stop)
        await asyncio.to_thread(late_etcd.start)  # it knows no token of before

        async def answers() -> bool:
            try:
                return await client.get("/x") is not None
            except UnreachableError:
                return False

        await until(answers, TIMEOUT_S, lambda: "the client does not log in again", 0.02)


async def test_tls_with_a_certificate_of_each_side(tmp_path: Path, certificates: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    files = {key: certificates / name for key, name in (("ca_file", "ca.pem"), ("cert_file", "mesh.pem"))}
    files["key_file"] = certificates / "mesh.key"
    options = (f"--cert-file={files['cert_file']}", f"--key-file={files['key_file']}", "--client-cert-auth")
    process = EtcdProcess(tmp_path, *options, f"--trusted-ca-file={files['ca_file']}", scheme="https")
    await asyncio.to_thread(process.start)
    try:
        async with connected(client_of(process, **files)) as client:

            async def answers() -> bool:
                try:
                    return await client.get("/x") is None
                except UnreachableError:
                    return False

            await until(answers, TIMEOUT_S, lambda: "etcd does not answer over TLS", 0.02)
        async with connected(client_of(process, ca_file=files["ca_file"])) as client:
            with pytest.raises(UnreachableError):
                await client.get("/x")
    finally:
        process.stop()


async def test_a_member_that_is_gone_is_passed_over(etcd: EtcdProcess) -> None:
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    async with connected(EtcdConfig(endpoints=(nobody, etcd.endpoint))) as client:
        assert await client.list_keys("/nothing/") == []
    async with connected(EtcdConfig(endpoints=(nobody,))) as client:
        with pytest.raises(UnreachableError, match=rf"balancer\.etcd\.endpoints: no answer from {nobody}"):
            await client.get("/x")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aetcd.rpc", None)
    with pytest.raises(UserError, match=r"balancer\.state: etcd needs the Python package aetcd; pip install"):
        EtcdClient(EtcdConfig())
