"""A gRPC server behind a gate, whose methods echo under names that the rules know; certificates and keys for it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.cli.certs import make_certificates
from expertmesh.mesh import rpc
from expertmesh.mesh.api_keys import ApiKey, Scope, dump_key_file, new_secret
from expertmesh.mesh.client_key import key_metadata
from expertmesh.mesh.config import ApiConfig, TlsConfig
from expertmesh.mesh.gate import Gate
from expertmesh.mesh.telemetry import disabled_telemetry

GENERATION, ADMIN = "expertmesh.v1.GenerationService", "expertmesh.v1.AdminService"
TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of roles and servers; ``expired/`` has some of the same authority, ``other/`` of another one, and
    ``door/`` one of a third that names this machine."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("authority")
    make_certificates(
        folder,
        ["balancer", "router-0", "attention-0", "expert-0", "expert-1", "operator", "client"],
        hosts=["127.0.0.1"],
    )
    make_certificates(folder / "other", ["operator", "router", "balancer"])
    (folder / "expired").mkdir()
    for name in ("ca.pem", "ca.key"):
        shutil.copy(folder / name, folder / "expired" / name)
    make_certificates(folder / "expired", ["operator", "router"], days=-1)
    make_certificates(folder / "door", ["client"], hosts=["127.0.0.1", "localhost"])
    return folder


def tls_as(folder: Path, name: str, ca: Path | None = None) -> TlsConfig:
    """As a holder of this certificate, who trusts the authority of ``folder`` or ``ca``."""
    return TlsConfig(cert_file=folder / f"{name}.pem", key_file=folder / f"{name}.key", ca_file=ca or folder / "ca.pem")


class Keys:
    """A file of keys; ``add`` returns the secret."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, ApiKey] = {}
        self._write()

    def add(self, key_id: str, *scopes: Scope, days: float = 1.0, **limits: float) -> str:
        key, sha256 = new_secret(key_id)
        now = datetime.now(UTC)
        self._entries[key_id] = ApiKey(
            id=key_id, sha256=sha256, scopes=scopes, created=now, expires=now + timedelta(days=days), **limits
        )
        self._write()
        return key

    def revoke(self, key_id: str) -> None:
        del self._entries[key_id]
        self._write()

    def _write(self) -> None:
        made = self.path.with_suffix(".new")
        made.write_text(dump_key_file(self._entries))
        made.replace(self.path)


async def _echo(request: bytes, context: object) -> bytes:
    return request


async def _stream(request: bytes, context: Any) -> None:
    await context.write(request)


def _register(server: grpc.aio.Server) -> Sequence[str]:
    unary: Any = grpc.unary_unary_rpc_method_handler(_echo)
    for service, methods in ((GENERATION, ("GenerateUnary",)), (ADMIN, ("GetStatus", "Drain"))):
        handlers: dict[str, Any] = dict.fromkeys(methods, unary)
        handlers["Generate"] = grpc.unary_stream_rpc_method_handler(_stream)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    return (GENERATION, ADMIN)


@asynccontextmanager
async def guarded(
    server_id: str = "router-0", *, tls: TlsConfig | None = None, api: ApiConfig | None = None, **options: Any
) -> AsyncIterator[str]:
    """Its address, while it runs."""
    tls = tls or TlsConfig()
    gate = Gate(tls, api or ApiConfig(), server_id)
    async with gate.open():
        server = await rpc.start_server(
            host="127.0.0.1",
            port=0,
            tls=tls,
            register=_register,
            telemetry=disabled_telemetry(),
            gate=gate,
            **options,
        )
        try:
            yield server.address
        finally:
            await server.stop(0)


async def call(
    channel: grpc.aio.Channel, method: str, key: str | None = None, data: bytes = b"hello", **options: Any
) -> bytes:
    """Echoes; options are of the call."""
    unary: Any = channel.unary_unary(f"/{method}")
    options = {"timeout": TIMEOUT_S, "metadata": key_metadata(key), **options}
    echoed: bytes = await unary(data, **options)
    return echoed


def raw_connection(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
