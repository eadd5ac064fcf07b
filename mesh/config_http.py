"""``router.http``: the OpenAI-compatible door of a router."""

from __future__ import annotations

from pydantic import Field

from expertmesh.mesh.config_section import Section


class HttpConfig(Section):
    enabled: bool = Field(True, description="serve the OpenAI-compatible API over HTTP as well")
    host: str | None = Field(None, description="unset = router.host")
    port: int = Field(0, ge=0, le=65535, description="0 = any free port")
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="a request with a larger body is refused with 413")
    max_header_bytes: int = Field(32 * 2**10, ge=1024, description="the request line and all headers; beyond it 431")
    receive_timeout_s: float = Field(
        20.0, gt=0, description="a request that has not arrived as a whole by then ends its connection"
    )
    keep_alive_s: float = Field(75.0, gt=0, description="an idle connection is closed after so long")
    max_connections: int = Field(8192, ge=1, description="beyond it requests are answered with 503")
    max_choices: int = Field(64, ge=1, description="prompts × n of one request; each is a request to the mesh")
