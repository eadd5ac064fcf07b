"""``scaling``: what a scale policy may do with the servers of a running mesh."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expertmesh.mesh.config_section import Section, YamlSwitch


class RoleScaling(Section):
    """Between how many servers of a role a scale policy may choose."""

    min_servers: int = Field(1, ge=1)
    max_servers: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> RoleScaling:
        if self.max_servers < self.min_servers:
            raise ValueError(f"max_servers is {self.max_servers}, less than min_servers = {self.min_servers}: raise it")
        return self


class ScalingConfig(Section):
    policy: Annotated[Literal["off", "dry-run", "on"], YamlSwitch] = Field(
        "off", description="dry-run: what would be done goes to the events; on: it is done where a launcher watches"
    )
    hook: str | None = Field(
        None,
        description="a policy of your own: `module:function`, or a name in the entry points "
        "`expertmesh.scale_policies`; unset = the one in docs/scaling.md",
    )
    attention: RoleScaling = RoleScaling()
    expert: RoleScaling = RoleScaling()
    both: RoleScaling = RoleScaling()
    interval_s: float = Field(2.0, gt=0, description="seconds between two looks at the mesh")
    hold_s: float = Field(10.0, ge=0, description="a wish has to last so long before anything is done")
    cooldown_s: float = Field(60.0, ge=0, description="after a change of servers, by whomever, nothing for so long")
    max_waiting: float = Field(
        4.0, gt=0, description="requests an attention server that may wait for a place in a batch; more add a server"
    )
    target_tpot_ms: float | None = Field(
        None, gt=0, description="a longer time between two tokens adds an expert server; unset = it adds none"
    )
    low_share: float = Field(
        0.5, gt=0, lt=1, description="a server goes when the rest would stay below this share of what adds one"
    )
