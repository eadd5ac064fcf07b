"""What every section of ``mesh.yaml`` is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys; one without any has its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        return {} if data is None else data


def _as_word(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


YamlSwitch = BeforeValidator(_as_word)
"""For a choice of words with ``on`` or ``off`` among them: YAML 1.1 reads those, bare, as true and false."""
