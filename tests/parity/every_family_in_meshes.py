"""Every family in meshes of real processes: prefill whole and in chunks, with the prefix cache and without.

    pytest tests/parity/every_family_in_meshes.py

Not a part of ``make test``: two meshes a family take minutes, and the computation of each is tested in process there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import families
from support.family_mesh import assert_mesh_continues_as_transformers
from support.mesh import Meshes

WAYS: dict[str, dict[str, Any]] = {
    "in chunks, with the prefix cache": {"attention__max_num_batched_tokens": 24},
    "whole, without the prefix cache": {"attention__enable_prefix_caching": False},
}


@pytest.mark.parametrize("family", families.FAMILIES)
async def test_two_by_two_with_replicas(meshes: Meshes, tmp_path: Path, family: str) -> None:
    path = families.make_family_checkpoint(tmp_path / family, family, seed=6, vocab_size=8192)
    for way in WAYS.values():
        await assert_mesh_continues_as_transformers(meshes, path, **way)
