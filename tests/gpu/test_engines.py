"""Two ranks on two GPUs, colocated and apart: the engines against transformers, with the planes that serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from support.checkpoints import make_tiny_qwen3_moe
from support.gpu_backends import DEEPEP
from support.gpu_engines import EngineJob, Request, close_engine, generate, num_captures, num_replays, open_engine
from support.gpu_ranks import PlaneConfig, Ranks, gpu_ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SIZES = {"hidden_size": 256, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32}
PROMPTS = [[5, 9, 200, 31, 44, 7], [3] * 40, list(range(1, 120)), [77], [400, 2, 3, 5, 8, 13, 21, 34] * 9]
LENGTH = 24
CONFIG: dict[str, Any] = {"max_num_seqs": 16, "kv_cache_bytes": 2**24}
ROLES = pytest.mark.parametrize("roles", ["bb", "ae", "ea"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    return make_tiny_qwen3_moe(path, seed=3, mlp_only_layers=[1], attention_bias=True, **SIZES)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with gpu_ranks(2) as both:
        yield both


def job(folder: Path, roles: str, backend: str, dtype: str, **options: Any) -> EngineJob:
    config = {**CONFIG, **options.pop("config", {})}
    return EngineJob(
        roles, PlaneConfig(backend, timeout_s=60.0), {"path": str(folder), "dtype": dtype}, config, **options
    )


def requests_of(roles: str, **sampling: Any) -> list[Request]:
    """The prompts, in turns to the ranks that have an attention half; the last one is alone at its end."""
    hosts = [rank for rank, role in enumerate(roles) if role in "ab"]
    lengths = [LENGTH + 8 * (handle == len(PROMPTS) - 1) for handle in range(len(PROMPTS))]
    return [
        Request(hosts[handle % len(hosts)], handle, prompt, {"max_tokens": lengths[handle], **sampling})
        for handle, prompt in enumerate(PROMPTS)
    ]


def outputs_of(ranks: Ranks, requests: list[Request]) -> dict[int, list[Any]]:
    found = ranks.run(generate, requests)
    return {handle: outputs for own in found for handle, outputs in own.items()}


@ROLES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"uses_graphs": False},
        {"config": {"prompt_graph_tokens": 0}},
        {"config": {"prompt_graph_tokens": 64}},
        {"config": {"max_num_batched_tokens": 17}},
        {"max_num_tokens": 8},
        {"micro_batches": 2},
        {"micro_batches": 2, "uses_graphs": False},
        {"micro_batches": 2, "config": {"max_num_batched_tokens": 17}},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(
    folder: Path, reference: Qwen3MoeForCausalLM, ranks: Ranks, roles: str, options: dict[str, Any]
) -> None:
    """In float32, which nccl carries; captured and not, in chunks of prompts, in parts of an exchange."""
    requests = requests_of(roles)
    ranks.run(open_engine, job(folder, roles, "nccl", "float32", **options))
    try:
        captures = ranks.run(num_captures)
        for _ in range(2):
            outputs = outputs_of(ranks, requests)
            for request in requests:
                ids = torch.tensor([request.prompt], device="cuda")
                count = request.sampling["max_tokens"]
                wanted = reference.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
                found = [output.token for output in outputs[request.handle] if output.token is not None]
                assert found == wanted[0, len(request.prompt) :].tolist()
        assert ranks.run(num_captures) == captures
        uses_graphs = options.get("uses_graphs", True)
        assert bool(captures[0]) == bool(captures[1]) == uses_graphs
        with_chunks = options.get("config", {}).get("prompt_graph_tokens", 1) and not options.get("micro_batches")
        (decodes, chunks), others = ranks.run(num_replays)
        assert (decodes, chunks) == others, "both ranks replay, whatever they bring"
        assert (bool(decodes), bool(chunks)) == (uses_graphs, bool(uses_graphs and with_chunks))
    finally:
        ranks.run(close_engine)


@ROLES
@pytest.mark.parametrize("backend", [DEEPEP, "nccl"])
@pytest.mark.parametrize("uses_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_log_probabilities_in_bfloat16_are_within_its_noise(
    folder: Path,
    reference: Qwen3MoeForCausalLM,
    ranks: Ranks,
    roles: str,
    backend: str,
    uses_graphs: bool,
    micro_batches: int,
) -> None:
    """Of the chosen tokens, against float32's of the same text; and no token is chosen that is far from the best."""
    requests = requests_of(roles, logprobs=1)
    options = {"uses_graphs": uses_graphs, "micro_batches": micro_batches}
    ranks.run(open_engine, job(folder, roles, backend, "bfloat16", **options))
    try:
        outputs = outputs_of(ranks, requests)
    finally:
        ranks.run(close_engine)
    for request in requests:
        tokens = [output.token for output in outputs[request.handle]]
        assert len(tokens) == request.sampling["max_tokens"]
        text = torch.tensor([[*request.prompt, *tokens]], device="cuda")
        with torch.inference_mode():
            values = reference(text).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        wanted = values.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0].cpu()
        found = torch.tensor([output.logprobs.chosen for output in outputs[request.handle]])
        assert (found - wanted).abs().mean() < 0.15
        assert (values.max(-1).values.cpu() - wanted).max() < 1.0
