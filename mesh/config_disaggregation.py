"""``disaggregation``: one mesh computes prompts, another one generates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expertmesh.mesh.addresses import is_address, split_addresses
from expertmesh.mesh.config_section import Section, YamlSwitch


class DisaggregationConfig(Section):
    """See docs/disaggregation.md."""

    role: Annotated[Literal["off", "prefill", "decode"], YamlSwitch] = Field(
        "off",
        description="prefill: attention servers hand the KV blocks of prompts out; decode: routers have prompts "
        "computed by the mesh of `prefill_balancer`, and attention servers fetch their KV blocks",
    )
    prefill_balancer: str | None = Field(
        None,
        description="role decode: HOST:PORT of the balancer of the mesh that computes prompts, several with commas",
    )
    min_prompt_tokens: int = Field(
        64, ge=2, description="role decode: shorter prompts are computed where their tokens are generated"
    )
    timeout_s: float = Field(
        5.0, gt=0, description="how long KV blocks may take to come; those that are late are computed again"
    )

    transport: Literal["auto", "tcp", "nixl"] = Field(
        "auto",
        description="how KV blocks travel: tcp between CPU ranks, nixl (docs/disaggregation.md) between ranks "
        "of either kind; auto = nixl on a GPU, else tcp",
    )
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="role prefill: where an attention server is asked for KV blocks; 0 = any free port",
    )

    @model_validator(mode="after")
    def _knows_where_prompts_go(self) -> DisaggregationConfig:
        if (self.role == "decode") != (self.prefill_balancer is not None):
            raise ValueError(
                f"role is {self.role} and prefill_balancer is {self.prefill_balancer!r}: role decode needs it, and no "
                "other has a use for it"
            )
        for address in split_addresses(self.prefill_balancer or ""):
            if not is_address(address):
                raise ValueError(
                    f"prefill_balancer: {address!r} is not HOST:PORT; write several as HOST:PORT,HOST:PORT"
                )
        return self
