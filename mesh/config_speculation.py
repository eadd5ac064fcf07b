"""``speculation``: how attention servers draft tokens that a step then verifies several at a time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expertmesh.mesh.config_section import Section, YamlSwitch


class SpeculationConfig(Section):
    """Keys are named as vLLM's ``speculative_config`` names them."""

    method: Annotated[Literal["off", "ngram", "mtp"], YamlSwitch] = Field(
        "off",
        description="where drafts come from: ngram = the request's own tokens, for every model; mtp = the checkpoint's "
        "layer of multi-token prediction (DeepSeek-V3, GLM-4.5); CPU only, see docs/speculation.md",
    )
    num_speculative_tokens: int | None = Field(
        None, ge=1, le=16, description="tokens that a draft has, at most; unset = 4, with mtp 1"
    )
    prompt_lookup_min: int = Field(2, ge=1, le=64, description="ngram: so many last tokens must have occurred before")
    prompt_lookup_max: int = Field(4, ge=1, le=64, description="ngram: and so many are looked for first")

    @model_validator(mode="after")
    def _in_order(self) -> SpeculationConfig:
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ValueError(
                f"prompt_lookup_max is {self.prompt_lookup_max}, less than prompt_lookup_min = "
                f"{self.prompt_lookup_min}: raise it"
            )
        return self

    @model_validator(mode="after")
    def _one_layer_drafts_one_token(self) -> SpeculationConfig:
        if self.method == "mtp" and (self.num_speculative_tokens or 1) > 1:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens} and method is mtp, whose layer drafts one "
                "token a step: set it to 1, or leave it out"
            )
        return self

    @property
    def max_tokens(self) -> int:
        """Of a draft."""
        return self.num_speculative_tokens or (1 if self.method == "mtp" else 4)
