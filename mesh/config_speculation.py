"""``speculation``: how attention servers draft tokens that a step then verifies several at a time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from expertmesh.mesh.config_section import Section


class SpeculationConfig(Section):
    """Keys are named as vLLM's ``speculative_config`` names them."""

    method: Literal["off", "ngram"] = Field(
        "off",
        description="where drafts come from: ngram = the request's own tokens, for every model; "
        "CPU only, see docs/speculation.md",
    )
    num_speculative_tokens: int = Field(4, ge=1, le=16, description="tokens that a draft has, at most")
    prompt_lookup_min: int = Field(2, ge=1, le=64, description="ngram: so many last tokens must have occurred before")
    prompt_lookup_max: int = Field(4, ge=1, le=64, description="ngram: and so many are looked for first")

    @field_validator("method", mode="before")
    @classmethod
    def _read_yaml_switch(cls, value: object) -> object:
        """YAML 1.1 reads a bare ``off`` as false."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _in_order(self) -> SpeculationConfig:
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max is {self.prompt_lookup_max}, less than prompt_lookup_min = "
                f"{self.prompt_lookup_min}: raise it"
            )
        return self
