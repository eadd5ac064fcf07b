"""The HTTP door's port."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.gate import Gate
from expertmesh.mesh.http_protocol import bounded_protocol
from expertmesh.mesh.http_server import HttpServer
from expertmesh.mesh.http_tls import server_context
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.router.calls import Calls
from expertmesh.router.http.app import HttpDoor

log = logging.getLogger(__name__)

_SPARE_FILES = 512


def make_http_server(
    config: MeshConfig,
    calls: Calls,
    gate: Gate,
    telemetry: Telemetry,
    why_not_serving: Callable[[], str],
    *,
    share_port: bool,
) -> HttpServer:
    """Bound, not yet started.

    Args:
        why_not_serving: '' while the mesh serves.
        share_port: other routers listen at it too.

    Raises:
        UserError: the port cannot be had.
    """
    http = config.router.http
    door = HttpDoor(calls, gate, http, telemetry, why_not_serving)
    _allow_files(http.max_connections + _SPARE_FILES)
    return HttpServer(
        door.app(),
        host=http.host or config.router.host,
        port=http.port,
        key="router.http.port",
        share_port=share_port,
        tls=server_context(config.door_tls),
        grace_s=1.0,  # what ran was waited for before
        settings={
            "http": bounded_protocol(http.max_header_bytes, http.receive_timeout_s),
            "timeout_keep_alive": http.keep_alive_s,
            "limit_concurrency": http.max_connections,
        },
    )


def _allow_files(wanted: int) -> None:
    """Every connection is one of this process's open files, of which many systems allow 1024 until asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("%d open files are allowed, fewer than router.http.max_connections may take", hard)
