"""docs/configuration.md and the example say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from expertmesh.mesh.config import load_config

ROOT = Path(__file__).parents[2]


def test_configuration_page_matches_the_fields() -> None:
    module_spec = importlib.util.spec_from_file_location(
        "generate_configuration", ROOT / "docs/generate_configuration.py"
    )
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == module.document(), "run `make gen`"


@pytest.mark.parametrize(("file", "name"), [("mesh.yaml", "local"), ("high-availability.yaml", "available")])
def test_example_is_valid(file: str, name: str) -> None:
    assert load_config(ROOT / "deploy/local" / file).name == name
