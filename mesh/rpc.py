"""gRPC servers and channels, made one way everywhere: health, reflection, TLS, keep-alive, bounded back-off."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertmesh.mesh import rpc_health
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc_guard import ExceptionGuard

if TYPE_CHECKING:
    from expertmesh.mesh.telemetry import Telemetry

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 2**20

# A peer that vanished without closing its sockets (power, network, SIGSTOP) is noticed within time + timeout. A peer
# that was killed is noticed at once: its kernel closes the connection.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 5000),
    # What counts in gRPC core: its keepalive_timeout_ms is never triggered (grpc/grpc#39239), and this is 60 s unset.
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS = (
    *_KEEPALIVE,
    # With it, two servers would share a port in silence.
    ("grpc.so_reuseport", 0),
    # Never answer a client's keep-alive with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
)
_CHANNEL_OPTIONS = (
    *_KEEPALIVE,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # gRPC's name for the time that one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 3000),
    # A restarted pod has a new address under its old name.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
)
# Beyond the grace period handlers are cancelled; one that resists cancellation must not keep the process.
_STOP_MARGIN_S = 2.0


class RpcServer:
    """A started server. Its health is NOT_SERVING until ``set_serving(True)``."""

    def __init__(self, server: grpc.aio.Server, health: rpc_health.Health, address: str) -> None:
        self._server = server
        self._health = health
        self.address = address
        """``host:port`` with the port that was bound; IPv6 hosts in brackets."""

    def set_serving(self, serving: bool) -> None:
        """Health of '' and of every service. Call on the event loop's thread."""
        self._health.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls, running calls get ``grace_s`` seconds and are then cancelled."""
        self._health.close()
        try:
            await asyncio.wait_for(self._server.stop(grace_s), grace_s + _STOP_MARGIN_S)
        except TimeoutError:
            log.warning("a call on %s resisted cancellation for %.1f s; leaving it", self.address, _STOP_MARGIN_S)


async def start_server(
    *,
    host: str,
    port: int,
    tls: TlsConfig,
    register: Callable[[grpc.aio.Server], Sequence[str]],
    telemetry: Telemetry,
    key: str = "port",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_concurrent_rpcs: int | None = None,
    options: Sequence[tuple[str, Any]] = (),
) -> RpcServer:
    """Bind, add health and reflection, start.

    Args:
        port: 0 = any free port.
        register: adds the servicers and returns their full service names.
        key: configuration key that a port that cannot be bound is blamed on, such as ``router.port``.
        max_message_bytes: larger requests end with RESOURCE_EXHAUSTED.
        max_concurrent_rpcs: further calls, health checks too, end with RESOURCE_EXHAUSTED; None = no limit.
        options: gRPC channel arguments that override the defaults.

    Raises:
        UserError: the address cannot be bound, or a TLS file cannot be used.
    """
    credentials = _server_credentials(tls)
    server = grpc.aio.server(
        interceptors=(ExceptionGuard(telemetry),),
        options=_merge(_SERVER_OPTIONS, max_message_bytes, options),
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )
    services = tuple(register(server))
    health = rpc_health.Health(services)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*services, rpc_health.SERVICE, reflection.SERVICE_NAME), server)
    try:
        bound = (
            server.add_secure_port(join_host_port(host, port), credentials)
            if credentials is not None
            else server.add_insecure_port(join_host_port(host, port))
        )
    except RuntimeError:
        raise UserError(
            key,
            f"{join_host_port(host, port)} cannot be bound ({_why_not(host, port)})",
            "choose a free port (0 = any) on an address of this machine",
        ) from None
    await server.start()
    return RpcServer(server, health, join_host_port(host, bound))


def open_channel(
    address: str,
    tls: TlsConfig,
    *,
    options: Sequence[tuple[str, Any]] = (),
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    section: str = "tls",
) -> grpc.aio.Channel:
    """A channel to ``host:port`` that reconnects for ever, at most a second between attempts, and uses no proxy.

    Connects with TLS when ``tls`` names a CA or a certificate. ``options`` override the defaults; ``section`` is where
    the configuration has the files of ``tls``.

    Raises:
        UserError: a TLS file cannot be used.
    """
    merged = _merge(_CHANNEL_OPTIONS, max_message_bytes, options)
    credentials = channel_credentials(tls, section)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=merged)
    return grpc.aio.secure_channel(address, credentials, options=merged)


def join_host_port(host: str, port: int) -> str:
    """``host:port``; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _merge(
    defaults: Sequence[tuple[str, Any]], max_message_bytes: int, options: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    return list({**dict(defaults), "grpc.max_receive_message_length": max_message_bytes, **dict(options)}.items())


def _why_not(host: str, port: int) -> str:
    """gRPC tells only that binding failed; binding once more by hand tells why."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return str(error)
    return "gRPC could not bind it"


def _server_credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    if tls.cert_file is None or tls.key_file is None:
        if tls.ca_file is not None:
            raise UserError(
                "tls.cert_file", "is unset though tls.ca_file is set", "set cert_file and key_file too, or none"
            )
        return None
    key, certificate = _read_pair(tls.cert_file, tls.key_file)
    ca = _read_ca(tls.ca_file) if tls.ca_file is not None else None
    return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)


def channel_credentials(tls: TlsConfig, section: str = "tls") -> grpc.ChannelCredentials | None:
    """What a client of this mesh connects with; None = without TLS.

    Raises:
        UserError: a TLS file cannot be used.
    """
    if tls.ca_file is None and tls.cert_file is None:
        return None
    ca = _read_ca(tls.ca_file, section) if tls.ca_file is not None else None
    key, certificate = (None, None)
    if tls.cert_file is not None and tls.key_file is not None:
        key, certificate = _read_pair(tls.cert_file, tls.key_file, section)
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _read_pair(cert_file: Path, key_file: Path, section: str = "tls") -> tuple[bytes, bytes]:
    """Private key and certificate chain, tried in OpenSSL: gRPC would find bad ones only at the first handshake."""
    certificate, key = _read(f"{section}.cert_file", cert_file), _read(f"{section}.key_file", key_file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"{section}.cert_file",
            f"{cert_file} and {key_file} are not a certificate and its key ({error})",
            "give PEM files that belong together, the key without a password",
        ) from None
    return key, certificate


def _read_ca(path: Path, section: str = "tls") -> bytes:
    data = _read(f"{section}.ca_file", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise UserError(f"{section}.ca_file", f"{path} holds no CA certificate ({error})", "give a PEM file") from None
    return data


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            key, f"{path} cannot be read ({error.strerror})", "give a PEM file this user can read"
        ) from None


def _no_password() -> str:
    """Keeps OpenSSL from asking for a pass phrase on the terminal."""
    return ""
