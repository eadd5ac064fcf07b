"""A ``both`` rank on a GPU: the whole engine against transformers, and against itself under other conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from support.checkpoints import make_tiny_qwen3_moe
from support.solo_rank import SoloRank

SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32}
PROMPTS = [[5, 9, 200, 31, 44, 7], [3] * 40, list(range(1, 120)), [77], [400, 2, 3, 5, 8, 13, 21, 34] * 9]
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_qwen3_moe(path, seed=3, mlp_only_layers=[1], attention_bias=True, **SIZES)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()


@pytest.fixture(scope="module")
def expected(reference: Qwen3MoeForCausalLM) -> list[list[int]]:
    """Greedy tokens of transformers."""
    return [
        reference.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def rank_of(folder: Path, dtype: Any = "float32", **config: Any) -> SoloRank:
    spec = load_spec(ModelConfig(path=folder, dtype=dtype))
    sizes = {"max_num_seqs": 16, "kv_cache_bytes": 2**24, **config}
    return SoloRank(spec, Checkpoint(folder), "cuda", **sizes)


def generate(rank: SoloRank, *, together: bool = True, **options: Any) -> list[list[int]]:
    for handle, prompt in enumerate(PROMPTS):
        rank.submit(handle, prompt, **{"max_tokens": LENGTH, **options})
        if not together:
            rank.step()
    rank.run()
    assert rank.load.kv_cache_usage == 0
    return [rank.tokens(handle) for handle in range(len(PROMPTS))]


CONFIGS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "prompts without graphs": {"prompt_graph_tokens": 0},
    "eager": {"uses_graphs": False},
    "chunks": {"max_num_batched_tokens": 17},
    "preemption": {"num_kv_blocks": 22, "block_size": 16, "kv_cache_bytes": None},
    "few rows": {"max_num_seqs": 2},
    "spare slots": {"spare_slots": 5},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_greedy_tokens_are_those_of_transformers(
    folder: Path, expected: list[list[int]], name: str, together: bool
) -> None:
    rank = rank_of(folder, **CONFIGS[name])
    assert generate(rank, together=together) == expected
    if rank.graphs is not None:
        assert any(step.has_chunks for step in rank.graphs.replays) == (name != "prompts without graphs")
    if name == "preemption" and together:
        assert rank.half.engine.counts.preemptions > 0


def test_cached_prefixes_change_no_token(folder: Path, expected: list[list[int]]) -> None:
    rank = rank_of(folder)
    assert generate(rank) == expected
    rank.outputs.clear()
    assert generate(rank) == expected
    assert rank.outputs[2][-1].cached_tokens >= 112


def test_no_step_is_without_a_graph_while_prompts_come_and_others_decode(
    folder: Path, expected: list[list[int]]
) -> None:
    """More decode than the least step with prompts has tokens; chunks that are no prompt's last, cached prefixes."""
    rank = rank_of(folder, max_num_seqs=80, max_num_batched_tokens=140, kv_cache_bytes=2**26)
    assert rank.graphs is not None
    captures = rank.graphs.num_captures
    for handle in range(100, 170):
        rank.submit(handle, PROMPTS[0], max_tokens=2 * LENGTH)
    steps = 0
    while len(rank.outputs) < 70:
        steps += bool(rank.step())
    for handle, prompt in enumerate(PROMPTS):
        rank.submit(handle, prompt, max_tokens=LENGTH)
        rank.submit(200 + handle, prompt, max_tokens=LENGTH, logprobs=1)
        steps += bool(rank.step())
    steps += rank.run()
    for handle, tokens in enumerate(expected):
        assert rank.tokens(handle) == rank.tokens(200 + handle) == tokens
    for handle in range(100, 170):
        assert rank.tokens(handle)[:LENGTH] == expected[0]
    assert rank.graphs.num_captures == captures
    assert rank.graphs.replays.total() == steps
    sizes = {step.size for step in rank.graphs.replays if step.has_chunks}
    assert 192 in sizes, "140 tokens take the step of 192"


def test_logits_in_bfloat16_are_within_its_noise(folder: Path, reference: Qwen3MoeForCausalLM) -> None:
    """Log probabilities of the chosen tokens, against float32's of the same text."""
    rank = rank_of(folder, dtype="bfloat16")
    tokens = generate(rank, logprobs=1)
    for handle, prompt in enumerate(PROMPTS):
        text = torch.tensor([prompt + tokens[handle]], device="cuda")
        with torch.inference_mode():
            values = reference(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = values.gather(1, torch.tensor(tokens[handle], device="cuda")[:, None])[:, 0].cpu()
        found = torch.tensor([output.logprobs.chosen for output in rank.outputs[handle]])
        assert (found - wanted).abs().mean() < 0.15


def test_a_stop_id_ends_a_sequence_and_drops_the_token_behind_it(folder: Path, expected: list[list[int]]) -> None:
    rank = rank_of(folder)
    stop = expected[0][5]
    tokens = generate(rank, end_ids=frozenset({stop}))
    for found, whole in zip(tokens, expected, strict=True):
        assert found == (whole[: whole.index(stop) + 1] if stop in whole else whole)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.9, "top_k": 40}, {"repetition_penalty": 1.3, "frequency_penalty": 0.2}, {"logit_bias": {3: 4.0}}],
    ids=str,
)
def test_a_draw_depends_on_seed_and_position_alone(folder: Path, options: dict[str, Any]) -> None:
    sampled = {"temperature": 1.0, "seed": 11, **options}
    together = generate(rank_of(folder), **sampled)
    assert generate(rank_of(folder, max_num_seqs=1), **sampled) == together
    rank = rank_of(folder)
    for handle, prompt in enumerate(PROMPTS):
        rank.submit(handle, prompt, output=together[handle][:7], max_tokens=LENGTH, **sampled)
    rank.run()
    assert [rank.tokens(handle) for handle in range(len(PROMPTS))] == [tokens[7:] for tokens in together]


def test_a_migration_between_replays_needs_no_capture(folder: Path, expected: list[list[int]]) -> None:
    """Experts swap their slots in the middle of decoding: tables change, graphs do not."""
    rank = rank_of(folder, spare_slots=2)
    assert rank.graphs is not None
    captures = rank.graphs.num_captures
    for handle, prompt in enumerate(PROMPTS):
        rank.submit(handle, prompt, max_tokens=LENGTH)
    for _ in range(8):
        rank.step()
    for layer in rank.spec.moe_layers:
        rank.migrate(layer, list(reversed(range(rank.slots.num_slots))))
    rank.run()
    assert [rank.tokens(handle) for handle in range(len(PROMPTS))] == expected
    assert rank.graphs.num_captures == captures
    assert rank.slots.slots(rank.spec.moe_layers[0])[0] == -1, "slot 0 holds what the last one held: nothing"


def test_a_slot_that_changes_its_expert_changes_what_is_computed(folder: Path, expected: list[list[int]]) -> None:
    """The table alone, without the routing that belongs to it: the graph follows."""
    rank = rank_of(folder, enable_prefix_caching=False)
    for layer in rank.spec.moe_layers:
        rank.swap_weights(layer, 0, 1)
        rank.swap_weights(layer, 2, 3)
    assert generate(rank) != expected
    for layer in rank.spec.moe_layers:
        rank.swap_weights(layer, 0, 1)
        rank.swap_weights(layer, 2, 3)
    rank.outputs.clear()
    assert generate(rank, together=False) == expected


def test_routing_is_counted_on_the_device(folder: Path) -> None:
    rank = rank_of(folder)
    generate(rank)
    computed = sum(len(prompt) + LENGTH - 1 for prompt in PROMPTS)
    load = rank.half.routing.slot_load_LG.sum(1).tolist()
    assert load == [computed * rank.spec.top_k] * len(rank.spec.moe_layers)
