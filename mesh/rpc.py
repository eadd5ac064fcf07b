"""gRPC servers and channels, made one way everywhere: health, reflection, TLS, keep-alive, bounded back-off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertmesh.mesh import rpc_health
from expertmesh.mesh.addresses import bind_problem
from expertmesh.mesh.config_security import ApiConfig, TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.gate import Gate
from expertmesh.mesh.rpc_door import Door
from expertmesh.mesh.rpc_guard import ExceptionGuard
from expertmesh.mesh.rpc_tls import Stamp, channel_credentials, files_stamp, server_credentials

if TYPE_CHECKING:
    from expertmesh.mesh.telemetry import Telemetry

log = logging.getLogger(__name__)

__all__ = [
    "MAX_MESSAGE_BYTES",
    "RpcServer",
    "Stamp",
    "calls_over",
    "channel_credentials",
    "files_stamp",
    "join_host_port",
    "open_channel",
    "role_options",
    "start_server",
]

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_CONCURRENT_STREAMS = 1024
"""Open calls of one connection; a client has further ones wait."""

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
    # gRPC's clients leave a second between two pings at least: theirs are never answered with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 5),
    # Who opens a connection and says nothing: gRPC's own limit is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", 8 * 2**10),
    ("grpc.absolute_max_metadata_size", 16 * 2**10),
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
# gRPC's own task, one for each call, which ends with it.
_CALL_STATUS = "_handle_status_once_received"
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
    share_port: bool = False,
    tls: TlsConfig,
    register: Callable[[grpc.aio.Server], Sequence[str]],
    telemetry: Telemetry,
    key: str = "port",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_concurrent_rpcs: int | None = None,
    max_concurrent_streams: int = MAX_CONCURRENT_STREAMS,
    gate: Gate | None = None,
    options: Sequence[tuple[str, Any]] = (),
) -> RpcServer:
    """Bind, add health and reflection, start.

    Args:
        port: 0 = any free port.
        share_port: others of this user may listen at it too, and get a part of the connections.
        register: adds the servicers and returns their full service names.
        key: configuration key that a port that cannot be bound is blamed on, such as ``router.port``.
        max_message_bytes: larger requests end with RESOURCE_EXHAUSTED.
        max_concurrent_rpcs: further calls, health checks too, end with RESOURCE_EXHAUSTED; None = no limit.
        max_concurrent_streams: of one connection.
        gate: who may call what; its owner keeps it open. None = what the roles of certificates say, where ``tls``
            has them.
        options: gRPC channel arguments that override the defaults.

    Raises:
        UserError: the address cannot be bound, or a TLS file cannot be used.
    """
    credentials = server_credentials(tls)
    if gate is None and tls.with_roles:
        gate = Gate.of_roles(tls, ApiConfig(), key)
    limits = (
        *_SERVER_OPTIONS,
        ("grpc.so_reuseport", int(share_port)),  # gRPC's default: two servers would share a port in silence
        ("grpc.max_concurrent_streams", max_concurrent_streams),
    )
    server = grpc.aio.server(
        interceptors=(Door(gate), ExceptionGuard(telemetry)),
        options=_merge(limits, max_message_bytes, options),
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
            f"{join_host_port(host, port)} cannot be bound ({bind_problem(host, port) or 'gRPC could not bind it'})",
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
    role: str | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """A channel to ``host:port`` that reconnects for ever, at most a second between attempts, and uses no proxy.

    Connects with TLS when ``tls`` names a CA or a certificate. ``options`` override the defaults; ``section`` is where
    the configuration has the files of ``tls``. ``role``: that of the server that is called; where certificates say
    their role, another one's does not do. Else it is the host's name that they have to have.

    Raises:
        UserError: a TLS file cannot be used.
    """
    merged = _merge(_CHANNEL_OPTIONS, max_message_bytes, (*options, *role_options(tls, role)))
    credentials = channel_credentials(tls, section)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=merged, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials, options=merged, interceptors=interceptors)


async def calls_over(timeout_s: float = 1.0) -> None:
    """Until gRPC has done with the calls of this event loop that were cancelled: await it before a loop is closed
    beside which others go on. What gRPC hears of a call whose loop is closed breaks off the round in which it hands
    out the events of all loops of the process, and is logged as an error by whichever loop does that."""
    ending = [task for task in asyncio.all_tasks() if _CALL_STATUS in getattr(task.get_coro(), "__qualname__", "")]
    if ending:
        await asyncio.wait(ending, timeout=timeout_s)


def role_options(tls: TlsConfig, role: str | None) -> tuple[tuple[str, str], ...]:
    """The gRPC option by which a client asks the server for a certificate of this role."""
    return (("grpc.ssl_target_name_override", tls.name_of(role)),) if role is not None and tls.with_roles else ()


def join_host_port(host: str, port: int) -> str:
    """``host:port``; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _merge(
    defaults: Sequence[tuple[str, Any]], max_message_bytes: int, options: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    return list({**dict(defaults), "grpc.max_receive_message_length": max_message_bytes, **dict(options)}.items())
