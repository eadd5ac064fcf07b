"""``router``: the front door and what it lets in."""

from __future__ import annotations

from pydantic import Field

from expertmesh.mesh.config_http import HttpConfig
from expertmesh.mesh.config_section import Section


class RouterConfig(Section):
    servers: int = Field(
        1,
        ge=1,
        le=64,
        description="processes that `expertmesh up` starts behind one address, each with these limits (docs/router.md)",
    )
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="0 = any free port")
    max_queued_requests: int = Field(
        4096, ge=1, description="admitted by one router and not finished; beyond it RESOURCE_EXHAUSTED"
    )
    max_requests_per_tenant: int = Field(2048, ge=1, description="the same, of one tenant")
    max_prompt_bytes: int = Field(4 * 2**20, ge=1024, description="a longer prompt is refused before it is tokenised")
    max_message_bytes: int = Field(
        64 * 2**20, ge=2**20, description="a larger request is refused by gRPC itself, which cannot say what to change"
    )
    client_stall_timeout_s: float = Field(60.0, gt=0, description="a client that reads nothing for so long is dropped")
    prefix_affinity_tokens: int = Field(
        64, ge=0, description="prompts that share so many first tokens prefer the same attention server; 0 = off"
    )
    prefix_affinity_slack_tokens: int = Field(
        512, ge=0, description="outstanding tokens by which the preferred server may exceed the least loaded one"
    )
    replay_attempts: int = Field(3, ge=0, description="attention servers that one request may lose")
    no_capacity_timeout_s: float = Field(
        30.0, gt=0, description="how long a request without a deadline waits for a mesh that serves"
    )
    http: HttpConfig = HttpConfig()
    vllm_grpc: bool = Field(
        False, description="serve vllm.grpc.engine.VllmEngine on the same port as well; needs the extra `vllm-grpc`"
    )
