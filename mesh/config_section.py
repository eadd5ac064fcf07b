"""What every section of ``mesh.yaml`` is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _as_word(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


YamlSwitch = BeforeValidator(_as_word)
"""For a choice of words with ``on`` or ``off`` among them: YAML 1.1 reads those, bare, as true and false."""
