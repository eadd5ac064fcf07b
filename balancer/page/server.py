"""The page's port: open for as long as the balancer runs, whoever leads."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from expertmesh.balancer.page.app import Admin, Scope, page_app
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.gate import Denied, Gate
from expertmesh.mesh.http_protocol import CERTIFICATE_KEY
from expertmesh.mesh.http_server import HttpServer
from expertmesh.mesh.http_tls import server_context

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_page(config: MeshConfig, leading: Callable[[], Admin], gate: Gate) -> AsyncIterator[str]:
    """Serve the page; yields its URL. Over TLS where the services have it: browsers show a key if there are keys, or
    a certificate.

    Args:
        leading: as ``page_app``.
        gate: asked for the scope `read`.

    Raises:
        UserError: its port cannot be used.
    """
    assert config.balancer.page_port is not None

    def may_read(scope: Scope) -> bool:
        presented = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        host, port = scope.get("client") or ("", 0)
        try:
            gate.admit_header(
                ", ".join(presented) or None,
                "read",
                peer=f"{host}:{port}",
                action=f"GET {scope['path']}",
                certificate=scope.get(CERTIFICATE_KEY),
            )
        except Denied:
            return False
        return True

    server = HttpServer(
        page_app(leading, may_read),
        host=config.balancer.host,
        port=config.balancer.page_port,
        key="balancer.page_port",
        tls=server_context(config.tls, asks_for_keys=config.api.keys_file is not None),
    )
    try:
        await server.start()
        url = f"{'http' if config.tls.cert_file is None else 'https'}://{server.address}"
        log.info("page on %s", url)
        yield url
    finally:
        await server.stop()
