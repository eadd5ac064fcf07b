"""The page's port: open for as long as the balancer runs, whoever leads."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from expertmesh.balancer.page.app import Admin, page_app
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.gate import Denied, Gate
from expertmesh.mesh.http_server import HttpServer
from expertmesh.mesh.http_tls import server_context

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_page(config: MeshConfig, leading: Callable[[], Admin], gate: Gate) -> AsyncIterator[str]:
    """Serve the page; yields its URL. Over TLS where the services have it: browsers show a key if there are keys, else
    a certificate.

    Args:
        leading: as ``page_app``.
        gate: asked for the scope `read`.

    Raises:
        UserError: its port cannot be used.
    """
    assert config.balancer.page_port is not None
    tls = config.tls
    if config.api.keys_file is not None:
        tls = tls.model_copy(update={"ca_file": None})

    def may_read(authorization: str) -> bool:
        try:
            gate.admit_header(authorization or None, "read", peer="page", action="page")
        except Denied:
            return False
        return True

    server = HttpServer(
        page_app(leading, may_read),
        host=config.balancer.host,
        port=config.balancer.page_port,
        key="balancer.page_port",
        tls=server_context(tls),
    )
    try:
        await server.start()
        url = f"{'http' if tls.cert_file is None else 'https'}://{server.address}"
        log.info("page on %s", url)
        yield url
    finally:
        await server.stop()
