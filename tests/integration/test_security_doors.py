"""Attempts on one server behind its gate, over real sockets: certificates, keys, limits, malformed and slow input."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.config import ApiConfig, TlsConfig
from expertmesh.mesh.http_tls import server_context
from support.http2 import Http2
from support.refusals import refusal, until_code
from support.secure_server import ADMIN, GENERATION, TIMEOUT_S, Keys, authority, call, guarded, raw_connection, tls_as

__all__ = ["authority"]

pytestmark = [pytest.mark.security, pytest.mark.slow]

Code = grpc.StatusCode
GENERATE = f"{GENERATION}/GenerateUnary"
READ, WRITE = f"{ADMIN}/GetStatus", f"{ADMIN}/Drain"


async def test_only_certificates_of_the_authority_that_are_valid_get_in(authority: Path) -> None:
    ca = authority / "ca.pem"
    async with guarded("router", tls=tls_as(authority, "router-0")) as address:
        async with rpc.open_channel(address, tls_as(authority, "operator"), role="router") as channel:
            assert await call(channel, GENERATE) == b"hello"
        strangers = {
            "plaintext": TlsConfig(),
            "no certificate": TlsConfig(ca_file=ca),
            "another authority": tls_as(authority / "other", "operator", ca),
            "expired": tls_as(authority / "expired", "operator", ca),
        }
        for what, tls in strangers.items():
            async with rpc.open_channel(address, tls, role="router") as channel:
                refused = await refusal(call(channel, GENERATE))
                assert refused.code() is Code.UNAVAILABLE, what


async def test_a_server_that_is_an_impostor_or_speaks_no_tls_is_not_believed(authority: Path) -> None:
    own, ca = tls_as(authority, "operator"), authority / "ca.pem"
    impostors = {
        "another role": tls_as(authority, "expert-0"),
        "another authority": tls_as(authority / "other", "balancer", ca),
        "expired": tls_as(authority / "expired", "router", ca),
        "plaintext": TlsConfig(),
    }
    for what, tls in impostors.items():
        role = "router" if what == "expired" else "balancer"
        async with guarded(tls=tls) as address, rpc.open_channel(address, own, role=role) as channel:
            assert (await refusal(call(channel, READ))).code() is Code.UNAVAILABLE, what


async def test_roles_of_certificates_decide_where_there_are_no_keys(authority: Path) -> None:
    async with guarded("balancer", tls=tls_as(authority, "balancer")) as address:
        for name, method, allowed in (
            ("operator", WRITE, True),
            ("client", READ, True),
            ("expert-0", READ, False),
            ("router-0", WRITE, False),
            ("expert-0", GENERATE, False),
        ):
            async with rpc.open_channel(address, tls_as(authority, name), role="balancer") as channel:
                if allowed:
                    assert await call(channel, method) == b"hello"
                else:
                    refused = await refusal(call(channel, method))
                    assert refused.code() is Code.PERMISSION_DENIED
                    assert name.partition("-")[0] in (refused.details() or "")


async def test_scopes_of_keys(tmp_path: Path) -> None:
    keys, audit = Keys(tmp_path / "keys.json"), tmp_path / "audit.jsonl"
    generate, read, admin = keys.add("gen", "generate"), keys.add("eye", "read"), keys.add("ops", "admin", "read")
    expired = keys.add("old", "generate", days=-1)
    api = ApiConfig(keys_file=keys.path, audit_file=audit)
    async with guarded(api=api) as address, rpc.open_channel(address, TlsConfig()) as channel:
        for key, method in ((generate, GENERATE), (read, READ), (admin, READ), (admin, WRITE)):
            assert await call(channel, method, key) == b"hello"
        refused: tuple[tuple[str | None, str, grpc.StatusCode], ...] = (
            (None, GENERATE, Code.UNAUTHENTICATED),
            ("emk.gen.wrong", GENERATE, Code.UNAUTHENTICATED),
            (expired, GENERATE, Code.UNAUTHENTICATED),
            (read, GENERATE, Code.PERMISSION_DENIED),
            (generate, READ, Code.PERMISSION_DENIED),
            (read, WRITE, Code.PERMISSION_DENIED),
            (generate, WRITE, Code.PERMISSION_DENIED),
        )
        for presented, method, code in refused:
            assert (await refusal(call(channel, method, presented))).code() is code, (presented, method)
        twice = (("authorization", f"Bearer {generate}"), ("authorization", f"Bearer {read}"))
        assert (await refusal(call(channel, GENERATE, metadata=twice))).code() is Code.UNAUTHENTICATED
    text = audit.read_text()
    for key in (generate, read, admin, expired):
        assert key.rpartition(".")[2] not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["outcome"] for line in lines if line["event"] == "admin"] == ["OK"]
    assert [(line["who"].get("key"), line["outcome"]) for line in lines if line["event"] == "denied"][-4:] == [
        ("gen", "PERMISSION_DENIED"),
        ("eye", "PERMISSION_DENIED"),
        ("gen", "PERMISSION_DENIED"),
        (None, "UNAUTHENTICATED"),
    ]


async def test_keys_are_revoked_and_rotated_without_a_restart(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    old, other = keys.add("ci", "generate"), keys.add("other", "generate")
    api = ApiConfig(keys_file=keys.path)
    async with guarded(api=api) as address, rpc.open_channel(address, TlsConfig()) as channel:
        assert await call(channel, GENERATE, old) == b"hello"
        new = keys.add("ci", "generate")
        await until_code(lambda: call(channel, GENERATE, new), Code.OK)
        assert (await refusal(call(channel, GENERATE, old))).code() is Code.UNAUTHENTICATED
        keys.revoke("other")
        await until_code(lambda: call(channel, GENERATE, other), Code.UNAUTHENTICATED)
        assert await call(channel, GENERATE, new) == b"hello"


async def test_a_rate_limit_says_when_to_try_again(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    slow, fast = keys.add("slow", "generate", requests_per_s=0.05), keys.add("fast", "generate")
    api = ApiConfig(keys_file=keys.path)
    async with guarded(api=api) as address, rpc.open_channel(address, TlsConfig()) as channel:
        assert await call(channel, GENERATE, slow) == b"hello"
        refused = await refusal(call(channel, GENERATE, slow))
        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert "requests_per_s" in (refused.details() or "")
        (hint,) = [value for key, value in refused.trailing_metadata() if key == "retry-after-ms"]
        assert 0 < int(hint) <= 20_000
        for _ in range(5):
            assert await call(channel, GENERATE, fast) == b"hello"


async def test_a_key_is_asked_for_before_the_request_is_read(tmp_path: Path) -> None:
    api = ApiConfig(keys_file=Keys(tmp_path / "keys.json").path)
    async with guarded(api=api) as address, rpc.open_channel(address, TlsConfig()) as channel:
        never_sent: Any = channel.stream_unary(f"/{GENERATE}")(timeout=TIMEOUT_S)
        assert (await refusal(never_sent)).code() is Code.UNAUTHENTICATED


@pytest.mark.parametrize("method", [GENERATE, f"{GENERATION}/Generate"])
async def test_a_call_that_sends_nothing_ends(method: str) -> None:
    api = ApiConfig(first_message_timeout_s=0.2)
    async with guarded(api=api) as address, rpc.open_channel(address, TlsConfig()) as channel:
        silent: Any = channel.stream_unary(f"/{method}")(timeout=TIMEOUT_S)
        refused = await refusal(silent)
        assert refused.code() is Code.DEADLINE_EXCEEDED
        assert "api.first_message_timeout_s" in (refused.details() or "")
        empty: Any = channel.stream_unary(f"/{method}")(_nothing(), timeout=TIMEOUT_S)
        assert (await refusal(empty)).code() is Code.INVALID_ARGUMENT


async def _nothing() -> Any:
    none: tuple[bytes, ...] = ()
    for message in none:
        yield message


async def test_a_connection_that_says_nothing_is_closed(authority: Path) -> None:
    quick = (("grpc.server_handshake_timeout_ms", 300),)
    async with guarded(tls=tls_as(authority, "router-0"), options=quick) as address:
        with raw_connection(address) as silent:
            assert await asyncio.to_thread(silent.recv, 1) == b""


async def test_messages_and_metadata_have_bounds() -> None:
    async with guarded(max_message_bytes=1 << 16) as address, rpc.open_channel(address, TlsConfig()) as channel:
        assert len(await call(channel, GENERATE, data=bytes(60_000))) == 60_000
        for attempt in (
            call(channel, GENERATE, data=bytes(70_000)),
            # 16 KB that become 16 MB: the bound is on what comes of it.
            call(channel, GENERATE, data=bytes(1 << 24), compression=grpc.Compression.Gzip),
            call(channel, GENERATE, metadata=(("x-much", "y" * 20_000),)),
        ):
            assert (await refusal(attempt)).code() is Code.RESOURCE_EXHAUSTED
        assert await call(channel, GENERATE) == b"hello"


async def test_pings_without_end_end_the_connection() -> None:
    async with guarded() as address:
        with Http2(address) as client:
            await asyncio.to_thread(client.ping_until_refused)
        async with rpc.open_channel(address, TlsConfig()) as channel:
            assert await call(channel, GENERATE) == b"hello"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"authorization", b"Bearer x\r\nx-admin: yes"),
        (b"traceparent", b"00\n{}"),
        (b"x-bad\r\nname", b"v"),
        (b"x-zero", b"a\0b"),
    ],
)
async def test_line_breaks_in_headers_reach_nothing(tmp_path: Path, name: bytes, value: bytes) -> None:
    """HTTP/2 frames carry them; a client library would refuse to send them."""
    keys, audit = Keys(tmp_path / "keys.json"), tmp_path / "audit.jsonl"
    async with guarded(api=ApiConfig(keys_file=keys.path, audit_file=audit)) as address:
        with Http2(address) as client:
            client.request(f"/{GENERATE}".encode(), [(name, value)])
            kinds = await asyncio.to_thread(client.frames_until_end)
        # Reset, or refused for want of a key; never a message.
        assert kinds & {Http2.HEADERS, Http2.RESET, Http2.GOAWAY}
        assert Http2.DATA not in kinds
        async with rpc.open_channel(address, TlsConfig()) as channel:
            assert (await refusal(call(channel, GENERATE))).code() is Code.UNAUTHENTICATED
    for line in audit.read_text().splitlines():
        assert "x-admin" not in json.loads(line)
        assert json.loads(line)["outcome"] == "UNAUTHENTICATED"


async def test_bytes_that_are_no_http2_are_refused_and_hurt_nobody() -> None:
    async with guarded() as address:
        for garbage in (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            bytes(range(256)) * 64,
            b"\x16\x03\x01\x02\x00" + bytes(512),
        ):
            with raw_connection(address) as connection:
                await asyncio.to_thread(_send_and_read_to_end, connection, garbage)
        async with rpc.open_channel(address, TlsConfig()) as channel:
            assert await call(channel, GENERATE) == b"hello"


async def test_a_new_certificate_is_used_without_a_restart(authority: Path, tmp_path: Path) -> None:
    tls = TlsConfig(cert_file=tmp_path / "door.pem", key_file=tmp_path / "door.key")
    _install(authority / "expired", "router", tmp_path)
    async with guarded(tls=tls) as address:
        trusting = TlsConfig(ca_file=authority / "door" / "ca.pem")
        async with rpc.open_channel(address, trusting) as channel:
            assert (await refusal(call(channel, GENERATE))).code() is Code.UNAVAILABLE
        _install(authority / "door", "client", tmp_path)
        async with rpc.open_channel(address, trusting) as channel:
            assert await call(channel, GENERATE) == b"hello"
        (tmp_path / "door.pem").write_text("half a cert")
        async with rpc.open_channel(address, trusting) as channel:
            assert await call(channel, GENERATE) == b"hello"


async def test_other_doors_use_a_new_certificate_too(authority: Path, tmp_path: Path) -> None:
    _install(authority / "expired", "router", tmp_path)
    context = server_context(TlsConfig(cert_file=tmp_path / "door.pem", key_file=tmp_path / "door.key"))
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=authority / "door" / "ca.pem")
    async with server:
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        _install(authority / "door", "client", tmp_path)
        for _ in range(2):
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
            writer.close()
            (tmp_path / "door.pem").write_text("half a certificate")


def _install(folder: Path, name: str, into: Path) -> None:
    for ending in ("pem", "key"):
        (into / f"new.{ending}").write_bytes((folder / f"{name}.{ending}").read_bytes())
        (into / f"new.{ending}").replace(into / f"door.{ending}")


def _send_and_read_to_end(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
