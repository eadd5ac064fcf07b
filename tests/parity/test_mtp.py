"""The layer of multi-token prediction: its drafts against a formula, and output that does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.request import Sequence as EngineSequence
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from support.attention import LocalEngine, SlotExperts, one_torch_thread
from support.families import load_reference, make_family_checkpoint
from support.mtp import LAYERS, MtpFormula, make_mtp_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 200, 31, 44, 7, 300, 12, 77], [400, 3, 3, 18], [250]]
NUM_TOKENS = 12
MTP = {"method": "mtp"}


class SometimesRight:
    """Drafts in place of the layer's own, of which every third is wrong: the layer has to see both."""

    def __init__(self, known: Mapping[int, Sequence[int]]) -> None:
        self._known = known

    def draft(self, sequence: EngineSequence, limit: int) -> Draft:
        start = sequence.num_output
        token = self._known[sequence.handle][start]
        return ((token + (start % 3 == 0)) % 512,)


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mtp") / request.param
    return make_mtp_checkpoint(path, seed=3, family=request.param)


def parts(folder: Path, *, mtp: bool = True) -> dict[str, Any]:
    spec = load_spec(ModelConfig(path=folder), mtp=mtp)
    checkpoint = Checkpoint(folder)
    return {"spec": spec, "checkpoint": checkpoint, "experts": SlotExperts(spec, checkpoint)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def greedy(folder: Path) -> dict[int, list[int]]:
    """transformers' tokens."""
    model = load_reference(folder)
    answers = {}
    with torch.inference_mode():
        for handle, prompt in enumerate(PROMPTS):
            out = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
            answers[handle] = out[0, len(prompt) :].tolist()
    return answers


def test_drafts_are_those_of_the_formula(folder: Path, tmp_path: Path) -> None:
    """Through chunked prefill, right drafts and wrong ones, in a batch."""
    formula, known = MtpFormula(folder, tmp_path / "deeper"), greedy(folder)
    with mock.patch("expertmesh.attention_server.half.open_drafter", return_value=SometimesRight(known)):
        engine = LocalEngine(**parts(folder), max_num_batched_tokens=8, block_size=4)
    model = engine.half._model
    for handle, prompt in enumerate(PROMPTS):
        engine.submit(handle, prompt, max_tokens=NUM_TOKENS)
    num_compared, counts = 0, []
    before = dict.fromkeys(known, 0)
    while engine.half.prepare():
        chunks = [chunk for chunk in engine.half._chunks if chunk.completes]
        engine.forward()
        with mock.patch.object(model, "logits", wraps=model.logits) as logits:
            engine.half.finish()
        own_CV = model.logits(logits.call_args.args[0]) if chunks else ()
        for chunk, own_V in zip(chunks, own_CV, strict=True):
            handle = chunk.sequence.handle
            tokens = engine.tokens(handle)
            counts.append(len(tokens) - before[handle])
            before[handle] = len(tokens)
            wanted_V = formula.logits([*PROMPTS[handle], *tokens])
            assert (own_V - wanted_V).abs().max() < 1e-4 * wanted_V.abs().max()
            num_compared += 1
    assert {handle: engine.tokens(handle) for handle in known} == known
    assert num_compared > 15
    assert set(counts) == {1, 2}, "drafts were accepted, and were not"


@pytest.mark.parametrize(("caching", "micro_batches"), [(True, 2), (False, 1)])
def test_output_is_that_without_drafts(folder: Path, caching: bool, micro_batches: int) -> None:
    known = greedy(folder)
    engine = LocalEngine(
        **parts(folder),
        speculation=MTP,
        enable_prefix_caching=caching,
        block_size=4,
        max_num_batched_tokens=7,
        micro_batches=micro_batches,
    )
    for again in (0, 10):
        for handle, prompt in enumerate(PROMPTS):
            engine.submit(handle + again, prompt, max_tokens=NUM_TOKENS)
        engine.run()
        assert {handle: engine.tokens(handle + again) for handle in known} == known


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.3}])
def test_good_drafts_halve_the_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    """A layer that is always right where the token before decides; sampled drafts share the draw of what they guess."""
    folder = make_mtp_checkpoint(tmp_path / "model", seed=5, loudness=0.0)
    prompt, options = PROMPTS[0], {"max_tokens": 20, **options}
    plain = LocalEngine(**parts(folder, mtp=False))
    plain.submit(1, prompt, **options)
    assert plain.run() == 20
    engine = LocalEngine(**parts(folder), speculation=MTP)
    engine.submit(1, prompt, **options)
    steps = engine.run()
    assert engine.tokens(1) == plain.tokens(1)
    assert steps <= 12 if options.get("temperature") else steps == 11


def test_step_that_breaks_anywhere_is_repeated(tmp_path: Path) -> None:
    folder = make_mtp_checkpoint(tmp_path / "model", seed=6, loudness=0.1)
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "frequency_penalty": 0.8, "max_tokens": 14}
    plain = LocalEngine(**parts(folder, mtp=False))
    plain.submit(1, PROMPTS[0], **options)
    plain.run()
    engine = LocalEngine(**parts(folder), speculation=MTP)
    engine.submit(1, PROMPTS[0], **options)
    layers = engine.spec.moe_layers
    while engine.half.prepare():
        for broken in range(len(layers) + 1):
            engine.forward(layers[:broken])
        assert engine.half.prepare() > 0
        engine.forward()
        engine.half.finish()
    assert engine.tokens(1) == plain.tokens(1)


def test_the_layer_is_one_more_with_experts(folder: Path) -> None:
    plain, spec = load_spec(ModelConfig(path=folder)), load_spec(ModelConfig(path=folder), mtp=True)
    assert spec.mtp_layer == LAYERS
    assert spec.moe_layers == (*plain.moe_layers, LAYERS)
    assert spec.kv_bytes_per_token * LAYERS == plain.kv_bytes_per_token * (LAYERS + 1)
    assert spec.fingerprint != plain.fingerprint


def test_model_without_the_layer_is_refused(tmp_path: Path) -> None:
    path = make_family_checkpoint(tmp_path / "v3", "deepseek_v3", seed=1, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="num_nextn_predict_layers is 0 or missing"):
        load_spec(ModelConfig(path=path), mtp=True)
    with pytest.raises(UserError, match="it is of qwen3_moe"):
        load_spec(ModelConfig(), mtp=True)
