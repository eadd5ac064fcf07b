"""Drafts that several rows of one sequence verify, for every kind of attention, and prompt lookup on the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.request import Sequence as EngineSequence
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.model.spec import load_spec
from support import reference
from support.attention import LocalEngine, SlotExperts, one_torch_thread
from support.families import write_family_checkpoint
from support.mesh import demo_prompts

pytestmark = pytest.mark.slow

PROMPT = [5, 9, 200, 31, 44, 7, 300, 12, 77, 400, 3]
NUM_TOKENS = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def parts(path: Path) -> dict[str, Any]:
    spec, checkpoint = load_spec(ModelConfig(path=path)), Checkpoint(path)
    return {"spec": spec, "checkpoint": checkpoint, "experts": SlotExperts(spec, checkpoint)}


class SometimesRight:
    """Four tokens of which the third or a later one is wrong, or none."""

    def __init__(self, known: list[int]) -> None:
        self._known = known

    def draft(self, sequence: EngineSequence, limit: int) -> Draft:
        start = sequence.num_output
        right = self._known[start : start + min(limit, 4)]
        return tuple(token ^ (index > 1 and (start + index) % 3 == 0) for index, token in enumerate(right))


# Windows and sinks, chunks and temperatures, a compressed cache, a norm of rows, plain ones.
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "deepseek_v2", "minimax_m2", "mixtral"])
def test_every_attention_verifies_drafts(tmp_path: Path, family: str) -> None:
    own = parts(write_family_checkpoint(tmp_path / family, family))
    plain = LocalEngine(**own)
    plain.submit(1, PROMPT, max_tokens=NUM_TOKENS)
    plain.run()
    with mock.patch("expertmesh.attention_server.half.open_drafter", return_value=SometimesRight(plain.tokens(1))):
        engine = LocalEngine(**own, max_num_batched_tokens=7, block_size=4)
    engine.submit(1, PROMPT, max_tokens=NUM_TOKENS)
    assert engine.run() < NUM_TOKENS
    assert engine.tokens(1) == plain.tokens(1)


@pytest.mark.parametrize("caching", [True, False])
def test_prompt_lookup_on_the_demo_model(caching: bool) -> None:
    path = demo_model_path()
    prompts = [reference.encode(path, 2 * prompt.text) for prompt in demo_prompts()[:3]]
    engine = LocalEngine(
        **parts(path), speculation={"method": "ngram"}, enable_prefix_caching=caching, max_num_batched_tokens=40
    )
    for handle, prompt in enumerate(prompts):
        engine.submit(handle, prompt, max_tokens=40)
    steps = engine.run()
    assert [tuple(engine.tokens(handle)) for handle in range(3)] == [*reference.greedy(path, tuple(prompts), 40, None)]
    assert steps < 40, "some drafts were right"
