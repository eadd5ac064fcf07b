"""The GPU engine without a GPU: its kernels in Triton's interpreter, everything but the graphs; against the CPU's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.attention_server.constraint import ConstraintCompiler
from expertmesh.mesh import padding
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.constraint import Constraint
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.padding import PaddedStep
from support.attention import LocalEngine, PlainExperts, one_torch_thread
from support.checkpoints import write_checkpoint
from support.small_tokens import EOS, TOKENS, write_tokenizer
from support.solo_rank import SoloRank
from support.thread_ranks import ThreadRanks

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
    "hidden_size": 32,
    "num_experts": 4,
    "vocab_size": 96,
}
PROMPT = [5, 9, 20, 31, 44, 7]
# In rows that belong to no slot, and pieces of no tokens.
NOTHING = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(path, dtype=torch.float32, attention_bias=True, **SIZES)
    spec = load_spec(ModelConfig(path=path))
    with one_torch_thread():
        yield {"spec": spec, "checkpoint": Checkpoint(path)}


@NOTHING
@pytest.mark.parametrize("pads", [False, True])
def test_the_same_tokens_as_on_the_cpu(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pads: bool) -> None:
    """Chunks beside decodes, few blocks, a stop id that is noticed a step late, options beyond the step's sampler."""
    monkeypatch.setattr(padding, "CHUNK_SIZES", (5, 8))
    config: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 7, "num_kv_blocks": 6, "block_size": 4}
    cpu = LocalEngine(parts["spec"], parts["checkpoint"], PlainExperts(parts["spec"], parts["checkpoint"]), **config)
    cpu.submit(1, PROMPT, max_tokens=4)
    cpu.run()
    stop = cpu.tokens(1)[1]
    rank = SoloRank(parts["spec"], parts["checkpoint"], "cpu", pads=pads, **config)
    staged = watch_staged(rank.half)
    cpu.outputs.clear()
    for engine in (cpu, rank):
        engine.submit(1, PROMPT, max_tokens=4)
        engine.submit(2, PROMPT, max_tokens=4, end_ids=frozenset({stop}))
        engine.submit(3, [3], max_tokens=3, repetition_penalty=1.4, logprobs=1, logit_bias={8: 1.5})
        engine.run()
    for handle in (1, 2, 3):
        assert rank.tokens(handle) == cpu.tokens(handle)
        assert rank.outputs[handle][-1].finish == cpu.outputs[handle][-1].finish
    for found, wanted in zip(rank.outputs[3], cpu.outputs[3], strict=True):
        assert found.logprobs is not None
        assert wanted.logprobs is not None
        assert found.logprobs.top_ids == wanted.logprobs.top_ids
        assert found.logprobs.chosen == pytest.approx(wanted.logprobs.chosen, abs=1e-3)
    assert rank.load.kv_cache_usage == 0
    computed = sum(len(PROMPT) + count - 1 for count in (4, 2)) + 3
    surplus = int(rank.half.routing.slot_load_LG.sum()) // parts["spec"].top_k - computed
    assert 0 <= surplus <= 4 * len(PROMPT), "what was computed again after a preemption, and the token behind the stop"
    assert {step is not None for step in staged} == {pads}
    assert not pads or {step.has_chunks for step in staged if step} == {True, False}
    rank.close()


def watch_staged(half: Any) -> list[PaddedStep | None]:
    """Gets what each step is padded to, None = it is not."""
    stage, staged = half.stage, list[PaddedStep | None]()

    def stage_and_note(padded: PaddedStep | None) -> None:
        staged.append(padded)
        stage(padded)

    half.stage = stage_and_note
    return staged


def test_blocks_can_be_handed_over_when_the_steps_under_way_are_over(parts: dict[str, Any]) -> None:
    """A rank on a GPU is a step ahead of what it knows; its blocks are of the CPU's size."""
    config: dict[str, Any] = {"max_num_seqs": 3, "num_kv_blocks": 12, "block_size": 4}
    cpu = LocalEngine(parts["spec"], parts["checkpoint"], PlainExperts(parts["spec"], parts["checkpoint"]), **config)
    rank = SoloRank(parts["spec"], parts["checkpoint"], "cpu", **config)
    here, there = cpu.half.block_memory, rank.half.block_memory
    assert here is not None
    assert there is not None
    assert here.block_bytes == there.block_bytes == 4 * parts["spec"].kv_bytes_per_token
    assert here.slabs == there.slabs
    assert len(there.regions()) == 1
    for engine, is_quiet_after_a_step in ((cpu, True), (rank, False)):
        quiet = watch_steps(engine.half)
        engine.submit(1, PROMPT, max_tokens=4)
        engine.run()
        assert quiet[0] is is_quiet_after_a_step
        assert engine.half.engine.prefixes.quiet()(), "all steps have landed"
    rank.close()


def watch_steps(half: Any) -> list[bool]:
    """Gets for each step whether none was under way after it."""
    finish, quiet = half.finish, list[bool]()

    def finish_and_ask() -> None:
        finish()
        quiet.append(half.engine.prefixes.quiet()())

    half.finish = finish_and_ask
    return quiet


@NOTHING
@pytest.mark.parametrize(
    ("roles", "micro_batches", "prompt_graph_tokens"), [("bb", 1, 7), ("ae", 1, 5), ("bb", 2, 7), ("ae", 2, 7)]
)
def test_ranks_of_a_view_give_the_same_tokens_in_padded_steps(
    parts: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    roles: str,
    micro_batches: int,
    prompt_graph_tokens: int,
) -> None:
    """Steps are padded to the size that all ranks agree on, also by a rank that has nothing to do."""
    monkeypatch.setattr(padding, "CHUNK_SIZES", (5, 8))  # fewer may be of sequences with one
    config: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 7, "num_kv_blocks": 12, "block_size": 4}
    config["prompt_graph_tokens"] = prompt_graph_tokens
    spec, checkpoint = parts["spec"], parts["checkpoint"]
    requests = {1: (PROMPT, 7), 2: (PROMPT[:3], 3), 3: ([3], 4)}
    cpu = LocalEngine(spec, checkpoint, PlainExperts(spec, checkpoint), **config)
    hosts = [rank for rank, role in enumerate(roles) if role in "eb"]
    mesh = ThreadRanks(spec, checkpoint, roles, spec.num_experts // len(hosts), micro_batches=micro_batches, **config)
    own = {1: 0, 2: 0, 3: len(roles) - 1 if roles == "bb" else 0}
    for handle, (prompt, length) in requests.items():
        cpu.submit(handle, prompt, max_tokens=length)
        mesh.ranks[own[handle]].submit(handle, prompt, max_tokens=length)
    cpu.run()
    mesh.start()
    mesh.wait([(rank, handle) for handle, rank in own.items()])
    for handle, rank in own.items():
        assert mesh.ranks[rank].tokens(handle) == cpu.tokens(handle)
    padded = [go for go in mesh.goes[0] if go.padded_tokens]
    eager = [go for go in mesh.goes[0] if any(go.num_tokens) and not go.padded_tokens]
    chunks = [go for go in padded if go.padded_chunks]
    if micro_batches == 1:
        assert any(go.padded_tokens > max(go.num_tokens) or 0 in go.num_tokens for go in padded), "nothing was padded"
        assert any(max(go.num_tokens) < go.padded_tokens for go in chunks), "no step with chunks was padded"
        assert bool(eager) == (prompt_graph_tokens < 7), "a step of more tokens is computed as it is"
        if roles == "bb":
            assert any(go.padded_tokens == 8 and min(go.num_tokens) for go in chunks), "a rank decodes beside prompts"
    else:
        assert eager
        assert not chunks, "chunks are padded only in steps that are one batch"
        split = [go for go in mesh.goes[0] if go.first_tokens]
        sizes = [(2 * go.padded_tokens, go.num_tokens[rank]) for go in split for rank in own.values()]
        assert any(size > count for size, count in sizes), "nothing was padded"
        assert any(not go.padded_tokens for go in split), "chunks of prompts are split, too"
        assert any(not go.first_tokens for go in padded), "one sequence is not split"
    assert mesh.goes[0] == mesh.goes[1], "all ranks make the same steps"
    mesh.close()


def test_constraints_are_followed_behind_the_step(parts: dict[str, Any], tmp_path: Path) -> None:
    """The samples of a sequence with a matcher are those of the CPU's engine, beside one that has none."""
    compiler = ConstraintCompiler(write_tokenizer(tmp_path / "tokenizer.json"), SIZES["vocab_size"], [EOS])
    cpu = LocalEngine(parts["spec"], parts["checkpoint"], PlainExperts(parts["spec"], parts["checkpoint"]))
    rank = SoloRank(parts["spec"], parts["checkpoint"], "cpu", max_num_seqs=3, num_kv_blocks=12, block_size=4)
    for engine in (cpu, rank):
        matcher = compiler.matcher(Constraint("regex", "(ab|c0){3}[x-z]"), [], ignore_eos=False)
        engine.submit(1, PROMPT, max_tokens=4)
        engine.submit(2, PROMPT, max_tokens=12, matcher=matcher)
        engine.run()
    text = "".join(TOKENS[token] for token in cpu.tokens(2))
    assert re.fullmatch("(ab|c0){3}[x-z]", text), text
    for handle in (1, 2):
        assert rank.tokens(handle) == cpu.tokens(handle)
        assert rank.outputs[handle][-1].finish == cpu.outputs[handle][-1].finish
    rank.close()
