"""A random checkpoint of a family in a mesh of real processes, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import families
from support.mesh import Meshes, generate_all, greedy_request
from support.reference import continuation

NUM_TOKENS = 32
PROMPTS = [list(range(2 + 31 * i, 3 + 31 * i + 11 * i)) for i in range(6)]


async def assert_mesh_continues_as_transformers(meshes: Meshes, path: Path, **overrides: Any) -> None:
    """2 attention and 2 expert servers with replicas, each prompt twice: greedy tokens are transformers'."""
    mesh = meshes.get(model__path=path, attention__servers=2, expert__servers=2, expert__num_slots=10, **overrides)
    requests = [greedy_request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    first = await generate_all(mesh.router, requests, concurrency=len(requests))
    again = await generate_all(mesh.router, requests, concurrency=len(requests))
    reference = families.load_reference(path)
    expected = [continuation(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert [output.token_ids for output in first] == expected
    assert [output.token_ids for output in again] == expected
