"""The page's port: open for as long as the balancer runs, whoever leads."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from expertmesh.balancer.page.app import Admin, page_app
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.http_server import HttpServer

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_page(config: MeshConfig, leading: Callable[[], Admin]) -> AsyncIterator[str]:
    """Serve the page; yields its URL.

    Args:
        leading: as ``page_app``.

    Raises:
        UserError: its port cannot be used.
    """
    assert config.balancer.page_port is not None
    server = HttpServer(
        page_app(leading), host=config.balancer.host, port=config.balancer.page_port, key="balancer.page_port"
    )
    try:
        await server.start()
        url = f"http://{server.address}"
        log.info("page on %s", url)
        yield url
    finally:
        await server.stop()
