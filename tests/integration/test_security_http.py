"""The HTTP door under attack: certificates of other roles, requests that two parsers read differently, bombs."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.telemetry import Metrics, Telemetry, disabled_telemetry
from support.fake_attention import FakeAttention
from support.router_stand import TIMEOUT_S, Stand
from support.secure_server import authority as authority
from support.secure_server import tls_as

pytestmark = [pytest.mark.security, pytest.mark.slow]

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[Stand]:
    running = Stand()
    yield running
    await running.close()


async def said(stand: Stand, data: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """All that the door answers until it closes the connection."""
    assert stand.http is not None
    host, _, port = stand.http.rpartition(":")
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            writer.write(data)
            return await reader.read(-1)
        finally:
            writer.transport.abort()


def trusting(folder: Path, certificate: TlsConfig | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if certificate is not None:
        assert certificate.cert_file is not None
        context.load_cert_chain(certificate.cert_file, certificate.key_file)
    return context


async def test_under_mutual_tls_http_looks_at_roles_as_grpc_does(stand: Stand, authority: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    names = {"cert_file": authority / "router-0.pem", "key_file": authority / "router-0.key"}
    stand.sections = {"tls": {**names, "ca_file": authority / "ca.pem"}, "api": {"audit_file": audit}}
    await stand.start([])
    asked = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    for name, status in (("client", b"200"), ("operator", b"200"), ("expert-0", b"403"), ("balancer", b"403")):
        answer = await said(stand, asked, trusting(authority, tls_as(authority, name)))
        assert answer.startswith(b"HTTP/1.1 " + status), name
    for certificate in (None, tls_as(authority / "other", "operator"), tls_as(authority / "expired", "operator")):
        try:
            answer = await said(stand, asked, trusting(authority, certificate))
        except OSError:
            answer = b""
        assert answer == b"", certificate
    assert '"certificate": "CN=expert-0"' in audit.read_text()


@pytest.mark.parametrize(
    "head",
    [
        POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: 0\r\ncontent-length: 36\r\n\r\n",
        POST + b"content-length: 0, 36\r\n\r\n",
        POST + b"content-length: +0\r\n\r\n",
        POST + b"content-length : 36\r\n\r\n",
        POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n",
        POST + b"x: a\rcontent-length: 36\r\n\r\n",
        POST + b"x: a\0b\r\ncontent-length: 0\r\n\r\n",
        POST.replace(b"\r\n", b"\n") + b"content-length: 0\n\n",
        POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"CONNECT elsewhere:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
async def test_what_a_proxy_might_read_otherwise_ends_the_connection(stand: Stand, head: bytes) -> None:
    """One answer, 400, and nothing of the request that is hidden behind it."""
    await stand.start([])
    answer = await said(stand, head + HEALTH)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"prompt": "a", "x": ' + b'{"a":' * 100_000,
        b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        gzip.compress(b'{"prompt": "' + bytes(1 << 24)),
    ],
)
async def test_json_that_is_a_bomb_is_a_bad_request(stand: Stand, body: bytes) -> None:
    await stand.start([FakeAttention("a0")])
    for path in (b"completions", b"chat/completions"):
        head = b"POST /v1/%b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%bcontent-length: %d\r\n\r\n" % (
            path,
            b"content-encoding: gzip\r\n" if body.startswith(b"\x1f") else b"",
            len(body),
        )
        assert (await said(stand, head + body)).startswith(b"HTTP/1.1 400 "), path
    assert b'"status":"ok"' in await said(stand, HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))


async def test_what_a_client_chooses_is_no_label_of_a_metric() -> None:
    """Names of requests, users, models, keys, paths and methods: none of them makes a series."""
    metrics = Metrics(role="router")
    stand = Stand(Telemetry(disabled_telemetry().tracer, metrics))
    try:
        await stand.start([FakeAttention("a0")])

        async def ask(number: int) -> None:
            mark = b"chosen-%d" % number
            body = b'{"model": "%b", "prompt": [5], "user": "%b"}' % (mark, mark)
            await said(
                stand,
                b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\nuser-agent: %b\r\nx-request-id: %b\r\n"
                b"authorization: Bearer emk.%b.x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (mark, mark, mark, mark, len(body), body),
            )
            await said(stand, b"GET /%b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % mark)

        def series() -> set[str]:
            return {
                f"{declared.name}{labels}"
                for declared, family, _ in metrics.families()
                for labels, _ in family.series()
            }

        await ask(0)
        before = series()
        for number in range(1, 20):
            await ask(number)
        assert series() == before
        assert not any("chosen" in one for one in before)
    finally:
        await stand.close()
