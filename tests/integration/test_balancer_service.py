"""The balancer with its real gRPC server, store and state file; servers are raw streams."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from expertmesh.balancer.state import STATE_FILE, decode
from expertmesh.balancer.turns import OnlyTurn
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.balancer_parts import registration
from support.balancer_stand import TIMEOUT_S, Stream, balancer, cli, config, join, wait_serving


async def test_a_view_forms_and_the_store_of_its_address_answers(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        streams = await join(channel, "r1", "a1", "e1", "e2")
        for stream in streams.values():
            assert (await stream.next_view()).number == 1
        status = await wait_serving(channel, 1)
        assert status.serving
        assert [(s.server_id, s.HasField("rank")) for s in status.servers] == [
            ("a1", True),
            ("e1", True),
            ("e2", True),
            ("r1", False),
        ]
        assert status.num_slots == 16
        placement = await admin_pb2_grpc.AdminServiceStub(channel).GetPlacement(admin_pb2.GetPlacementRequest())
        assert [layer.layer for layer in placement.layers] == [0, 2]
        assert list(placement.slot_servers) == ["e1"] * 8 + ["e2"] * 8
        assert await asyncio.to_thread(_store_round_trip, streams["a1"].views[0].store_address) == b"hello"


def _store_round_trip(address: str) -> bytes:
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    store.set("view/1/key", "hello")
    value: bytes = store.get("view/1/key")
    return value


async def test_a_balancer_that_is_compiling_its_solver_serves_and_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "expertmesh.balancer.compiling")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # a new installation: it compiles for half a minute
    async with balancer(config(tmp_path, mode="online")) as address, rpc.open_channel(address, TlsConfig()) as channel:
        for stream in (await join(channel, "a1", "e1", "e2")).values():
            await stream.next_view()
        await wait_serving(channel, 1)
        ended_s = time.monotonic() + 10
    assert time.monotonic() < ended_s
    started = [r.getMessage() for r in caplog.records if r.name == "expertmesh.balancer.compiling"]
    assert len(started) == 1, "it had compiled before it was told to stop"
    assert not Path("/proc", started[0].rsplit(" ", 1)[1]).exists()


async def test_a_cut_stream_and_a_broken_view_make_the_next_view(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        streams = await join(channel, "a1", "e1", "e2")
        for stream in streams.values():
            await stream.next_view()
        await wait_serving(channel, 1)
        streams["e2"].cut()
        broken = mesh_pb2.ViewBroken(view_number=1, reason="test", suspects=["e2"])
        await streams["a1"].say(view_broken=broken)
        view = await streams["a1"].next_view()
        assert (view.number, [rank.server_id for rank in view.ranks]) == (2, ["a1", "e1"])
        again = Stream(channel, registration("e2"))
        await again.register()
        assert "given up" in (await again.next("fenced")).reason
        with pytest.raises(EOFError, match="OK"):
            await again.next("view")


async def test_a_wrong_first_message_or_model_ends_the_stream_with_a_reason(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        silent = Stream(channel, registration("e1"))
        await silent.say(heartbeat=mesh_pb2.Heartbeat())
        code, details = await silent.ended()
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "registration" in details
        await join(channel, "a1")
        other = Stream(channel, registration("e1", fingerprint="other"))
        await other.say(registration=other.registration)
        code, details = await other.ended()
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "other" in details
        twin = Stream(channel, registration("a1", incarnation="2"))
        await twin.say(registration=twin.registration)
        assert (await twin.ended())[0] == grpc.StatusCode.ALREADY_EXISTS
        layer = admin_pb2.GetPlacementRequest(layers=[7])
        assert not (await admin_pb2_grpc.AdminServiceStub(channel).GetPlacement(layer)).layers


async def test_a_restarted_balancer_adopts_the_view(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        streams = await join(channel, "a1", "e1", "e2")
        views = {server_id: await stream.next_view() for server_id, stream in streams.items()}
        before = await wait_serving(channel, 1)
    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        back = [
            Stream(channel, registration(server_id, view_number=1, view_secret=view.secret, view=view))
            for server_id, view in views.items()
        ]
        for stream in back:
            await stream.register()
        after = await wait_serving(channel, 1, "view_adopted")
        assert after.mesh_id == before.mesh_id
        assert after.view_number == 1


async def test_a_mesh_goes_on_while_the_disk_is_full_and_its_state_is_saved_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnlyTurn, "save_retry_s", 0.05)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            for stream in (await join(channel, "a1", "e1", "e2")).values():
                await stream.next_view()
            assert (await wait_serving(channel, 1)).serving
        async for event in admin.ListEvents(admin_pb2.ListEventsRequest(follow=True), timeout=TIMEOUT_S):
            if event.kind == "state_saved":
                break
        events = [event async for event in admin.ListEvents(admin_pb2.ListEventsRequest(), timeout=TIMEOUT_S)]
        failures = [event.message for event in events if event.kind == "state_not_saved"]
        assert len(failures) == 1
        assert "No space left on device); serving goes on" in failures[0]
        saved = decode((tmp_path / STATE_FILE).read_bytes())
        assert saved.view.number == 1


async def test_a_second_balancer_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)):
        with pytest.raises(UserError, match="in use by another balancer"):
            async with balancer(config(tmp_path)):
                pass


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    async with balancer(config(tmp_path / "one")) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(UserError, match=r"balancer\.port"):
            async with balancer(config(tmp_path / "two", port=port)):
                pass


@pytest.mark.slow
async def test_the_admin_command_line(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        streams = await join(channel, "a1", "e1", "e2")
        for stream in streams.values():
            await stream.next_view()
        await wait_serving(channel, 1)
        where = ("--balancer", address)
        code, out, err = await cli("status", *where, "--json")
        assert (code, err) == (0, "")
        status = json.loads(out)
        assert (status["view"], status["model"], status["balancer"]["mode"]) == (1, "m", "static")
        assert {"id", "role", "state", "pid", "address", "node", "num_slots"} <= status["servers"][0].keys()
        assert [server["state"] for server in status["servers"]] == ["serving"] * 3
        code, out, _ = await cli("placement", *where, "--json")
        layer = json.loads(out)["layers"][0]
        assert (layer["layer"], layer["version"]) == (0, 1)
        assert sorted(expert for expert in layer["slots"] if expert >= 0) == list(range(8))
        assert len(layer["ranks"]) == len(layer["slots"])
        code, out, _ = await cli("events", *where, "--json")
        assert [json.loads(line)["number"] for line in out.splitlines()] == list(range(1, len(out.splitlines()) + 1))
        for command, wanted in (("status", "serving"), ("placement", "0-3"), ("events", "view_published")):
            code, out, _ = await cli(command, *where)
            assert code == 0
            assert wanted in out
        code, _, err = await cli("placement", "5", *where)
        assert code == 1
        assert "INVALID_ARGUMENT" in err
    code, out, err = await cli("status", *where)
    assert (code, out) == (1, "")
    assert f"the balancer at {address} cannot be reached" in err
    assert "Traceback" not in err


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, expertmesh.cli.admin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
