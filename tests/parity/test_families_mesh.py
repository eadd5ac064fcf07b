"""Families in a mesh of real processes, 2 attention and 2 expert servers with replicas: transformers' greedy tokens.

Those that ask most of it: shared experts and a compressed cache, experts with biases, experts whose input is scaled.
``pytest tests/parity/every_family_in_meshes.py`` has them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import families
from support.family_mesh import assert_mesh_continues_as_transformers
from support.mesh import Meshes

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 8},
    "gpt_oss": {"num_local_experts": 6},
    "llama4_text": {"num_local_experts": 5, "interleave_moe_layer_step": 2},
}


@pytest.mark.parametrize("family", CASES)
async def test_two_by_two_with_replicas(meshes: Meshes, tmp_path: Path, family: str) -> None:
    path = families.make_family_checkpoint(tmp_path / family, family, seed=5, vocab_size=8192, **CASES[family])
    await assert_mesh_continues_as_transformers(meshes, path, attention__max_num_batched_tokens=24)
