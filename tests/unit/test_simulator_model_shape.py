"""Sizes for the simulator, from the config.json of published models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from expertmesh.balancer.simulator.model_shape import PRESETS, shape_of
from expertmesh.mesh.model.families import find_family
from expertmesh.mesh.model.fields import read_fields

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.mark.parametrize(
    ("file", "preset"),
    [("deepseek-v3", "deepseek-r1"), ("qwen3-30b-a3b", "qwen3-30b-a3b"), ("mixtral-8x7b", "mixtral-8x7b")],
)
def test_published_configurations_have_the_sizes_that_are_known(file: str, preset: str) -> None:
    config = read_fields(CONFIGS / f"{file}.json")
    shape, known = shape_of(preset, find_family(config).read(config)), PRESETS[preset]
    assert dataclasses.replace(shape, weight_bytes=known.weight_bytes) == known


def test_shared_experts_count_as_dense() -> None:
    config = read_fields(CONFIGS / "llama-4-maverick.json")
    arch = find_family(config).read(config)
    without = shape_of("x", dataclasses.replace(arch, shared=None))
    assert shape_of("x", arch).dense_params - without.dense_params == 24 * 3 * 5120 * 8192
