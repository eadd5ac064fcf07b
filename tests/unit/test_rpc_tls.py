"""TLS of servers and channels over loopback sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from expertmesh.cli.health_probe import HealthProbe
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc import open_channel
from support.rpc_stand import (
    NO_TLS,
    NOT_SERVING,
    failure,
    health_of,
    running,
)


def tls_of(folder: Path, name: str, ca: str | None = "ca.pem") -> TlsConfig:
    return TlsConfig(
        cert_file=folder / f"{name}.pem", key_file=folder / f"{name}.key", ca_file=folder / ca if ca else None
    )


@pytest.mark.slow
async def test_mutual_tls(certificates: Path) -> None:
    tls = tls_of(certificates, "mesh")
    async with running(tls=tls) as server:
        async with open_channel(server.address, tls) as channel:
            assert await health_of(channel) == NOT_SERVING
        strangers = (NO_TLS, TlsConfig(ca_file=certificates / "ca.pem"), tls_of(certificates, "other"))
        for stranger in strangers:
            async with open_channel(server.address, stranger) as channel:
                assert (await failure(health_of(channel)))[0] == grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
async def test_tls_of_the_server_alone(certificates: Path) -> None:
    async with running(tls=tls_of(certificates, "mesh", ca=None)) as server:
        async with open_channel(server.address, TlsConfig(ca_file=certificates / "ca.pem")) as channel:
            assert await health_of(channel) == NOT_SERVING
        async with open_channel(server.address, TlsConfig(ca_file=certificates / "other-ca.pem")) as channel:
            assert (await failure(health_of(channel)))[0] == grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
async def test_probe_does_not_wait_for_a_certificate_to_become_right(certificates: Path) -> None:
    # Of another authority; for another address than the one that is called.
    for host, ca in (("127.0.0.1", "other-ca.pem"), ("127.0.0.2", "ca.pem")):
        async with running(tls=tls_of(certificates, "mesh", ca=None), host=host) as server:
            with (
                HealthProbe(server.address, TlsConfig(ca_file=certificates / ca)) as probe,
                pytest.raises(UserError, match=r"is refused.*api\.cert_file"),
            ):
                await asyncio.to_thread(probe.is_serving, 10.0)


@pytest.mark.slow
async def test_tls_files_that_cannot_be_used(certificates: Path, tmp_path: Path) -> None:
    key, cert, ca = certificates / "mesh.key", certificates / "mesh.pem", certificates / "ca.pem"
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nx\n")
    for tls, blamed in (
        (TlsConfig(cert_file=tmp_path / "missing.pem", key_file=key), r"tls\.cert_file: .*missing\.pem cannot be read"),
        (TlsConfig(cert_file=cert, key_file=tmp_path), r"tls\.key_file: .*cannot be read"),
        (
            TlsConfig(cert_file=cert, key_file=certificates / "other.key"),
            r"tls\.cert_file: .*not a certificate and its",
        ),
        (TlsConfig(cert_file=cert, key_file=key, ca_file=garbage), r"tls\.ca_file: .*garbage\.pem"),
    ):
        with pytest.raises(UserError, match=blamed):
            open_channel("127.0.0.1:1", tls)
        with pytest.raises(UserError, match=blamed):
            async with running(tls=tls):
                raise AssertionError
    with pytest.raises(UserError, match=r"tls\.cert_file: is unset"):
        async with running(tls=TlsConfig(ca_file=ca)):
            raise AssertionError
