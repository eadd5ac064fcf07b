"""``model``: which checkpoint the mesh runs, and in what precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from expertmesh.mesh.config_section import Section
from expertmesh.mesh.model.hub import REPO_PATTERN


class ModelConfig(Section):
    path: Path | None = Field(None, description="Hugging Face folder; unset = the demo model that the repository ships")
    repo: str | None = Field(
        None,
        pattern=REPO_PATTERN,
        description="instead of path: ORGANISATION/NAME on the Hugging Face hub, fetched into its cache",
    )
    revision: str | None = Field(None, min_length=1, description="of repo: a commit, tag or branch; unset = main")
    name: str | None = Field(None, description="name that clients may ask for; unset = repo, or the folder's name")
    chat_template: Path | None = Field(
        None, description="a file of Jinja; unset = the checkpoint's own, where it has one"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights, activations and KV cache")
    max_model_len: int | None = Field(None, ge=2, description="prompt + output tokens; unset = the checkpoint's")
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="auto = safetensors files; dummy = random weights, for benchmarks: the folder then needs no more "
        "than config.json, and a tokenizer where text is asked for",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None and self.repo is not None:
            raise ValueError("path and repo are both set: leave one out")
        if self.revision is not None and self.repo is None:
            raise ValueError("revision is set and repo is not: a folder has no revisions")
        return self
