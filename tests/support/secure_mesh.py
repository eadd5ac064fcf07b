"""A whole mesh with certificates and keys, and who asks it."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import grpc
import yaml
from typer.testing import CliRunner, Result

from expertmesh.cli.certs import make_certificates
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.main import build_app
from expertmesh.mesh import rpc
from expertmesh.mesh.client import Completion, GenerateClient, build_request
from expertmesh.mesh.client_key import key_interceptors, key_metadata
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support.mesh import mesh_config, start_mesh
from support.otlp_collector import Collector
from support.secure_server import TIMEOUT_S, Keys, tls_as

NUM_TOKENS = 24
IDS = ("balancer", "router-0", "attention-0", "expert-0", "expert-1", "operator", "client")


class SecureMesh:
    """1 attention and 2 expert servers, mutual TLS with a certificate for each server, keys and TLS at the doors."""

    def __init__(self, folder: Path, collector: Collector) -> None:
        self.folder, self.collector = folder, collector
        self.tls = folder / "tls"
        make_certificates(self.tls, IDS, hosts=["127.0.0.1"])
        make_certificates(self.tls / "other", ["expert-0", "operator"])
        (self.tls / "expired").mkdir()
        for name in ("ca.pem", "ca.key"):
            (self.tls / "expired" / name).write_bytes((self.tls / name).read_bytes())
        make_certificates(self.tls / "expired", ["operator"], days=-1)
        make_certificates(folder / "door", ["client"], hosts=["127.0.0.1"])
        self.keys = Keys(folder / "keys.json")
        self.generate = self.keys.add("app", "generate")
        self.read = self.keys.add("eye", "read")
        self.admin = self.keys.add("ops", "read", "admin")
        self.audit = folder / "audit.jsonl"
        config = mesh_config(
            attention__servers=1,
            expert__servers=2,
            telemetry__otlp_endpoint=collector.address,
            telemetry__log_level="debug",
            telemetry__metrics_port=0,
            balancer__page_port=0,
            tls__cert_file=self.tls / "{id}.pem",
            tls__key_file=self.tls / "{id}.key",
            tls__ca_file=self.tls / "ca.pem",
            api__cert_file=folder / "door" / "client.pem",
            api__key_file=folder / "door" / "client.key",
            api__ca_file=folder / "door" / "ca.pem",
            api__keys_file=self.keys.path,
            api__audit_file=self.audit,
        )
        self.config_file = folder / "mesh.yaml"
        self.config_file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        with mock.patch.dict(os.environ, EXPERTMESH_API_KEY=self.read):
            self.mesh: LocalMesh = start_mesh(folder / "state", config)

    def as_(self, name: str) -> TlsConfig:
        return tls_as(self.tls, name)

    @asynccontextmanager
    async def balancer(self, tls: TlsConfig, key: str | None = None) -> AsyncIterator[grpc.aio.Channel]:
        address, keys = self.mesh.balancer, key_interceptors(key)
        async with rpc.open_channel(address, tls, role="balancer", interceptors=keys) as channel:
            yield channel

    def client(self, key: str | None) -> GenerateClient:
        return GenerateClient(self.mesh.router, TlsConfig(ca_file=self.folder / "door" / "ca.pem"), key)

    async def ask(self, key: str | None, prompt: Sequence[int]) -> Completion:
        request = build_request(prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        async with self.client(key) as client:
            return await client.complete(request, timeout_s=TIMEOUT_S)

    def config_as(self, name: str) -> Path:
        """The configuration with this certificate, whoever asks."""
        data = yaml.safe_load(self.config_file.read_text())
        data["tls"] |= {"cert_file": str(self.tls / f"{name}.pem"), "key_file": str(self.tls / f"{name}.key")}
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(data))
        return file

    def command(self, *arguments: str, key_file: Path | None = None, config: Path | None = None) -> Result:
        """``expertmesh`` with these, in this process: what it says, and its exit status."""
        environment = {"EXPERTMESH_API_KEY_FILE": None if key_file is None else str(key_file)}
        command = [*arguments, "--config", str(config or self.config_file)]
        return CliRunner().invoke(build_app(command), command, env=environment)


async def get_status(channel: grpc.aio.Channel) -> admin_pb2.GetStatusResponse:
    return await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)


async def set_mode(channel: grpc.aio.Channel) -> admin_pb2.SetModeResponse:
    request = admin_pb2.SetModeRequest(mode="static")
    return await admin_pb2_grpc.AdminServiceStub(channel).SetMode(request, timeout=TIMEOUT_S)


def https(url: str, authority: Path, key: str | None = None, body: object = None) -> tuple[int, bytes]:
    """Status and body of the answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **dict(key_metadata(key))}
    request = urllib.request.Request(url, data=data, headers=headers)
    trusting = ssl.create_default_context(cafile=authority)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=trusting) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
