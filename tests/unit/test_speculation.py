"""Speculation in an attention half: whatever is drafted, the output is that without drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from opentelemetry.trace import NoOpTracer

from expertmesh.attention_server.constraint import ConstraintCompiler
from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.events import Abort
from expertmesh.attention_server.kv_cache import chain_digests
from expertmesh.attention_server.outputs import Output
from expertmesh.attention_server.request import Sequence as EngineSequence
from expertmesh.attention_server.server import AttentionServer
from expertmesh.attention_server.tracing import RequestTrace
from expertmesh.mesh.config import MeshConfig, ModelConfig
from expertmesh.mesh.config_speculation import SpeculationConfig
from expertmesh.mesh.constraint import Constraint
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.telemetry import Metrics, Telemetry, disabled_telemetry
from expertmesh.v1 import generate_pb2
from support.attention import LocalEngine, PlainExperts, one_torch_thread
from support.checkpoints import write_checkpoint
from support.small_tokens import EOS, write_tokenizer

PROMPT = [5, 9, 200, 31, 44, 7]
REPEATING = [17, 230, 41, 99, 8, 63] * 4
VOCAB = 512

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 11},
    "filtered": {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 5},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "sampled penalties": {"temperature": 1.0, "frequency_penalty": 1.5, "seed": 2},
    "logprobs": {"logprobs": 3, "temperature": 0.9, "seed": 1},
    "bias": {"logit_bias": {3: 4.0, 7: -3.0}},
}


class Oracle:
    """Drafts the ``known`` continuation of a sequence, with every so many tokens a wrong one."""

    def __init__(self, known: Sequence[int], wrong_every: int, num_tokens: int = 3) -> None:
        self._known, self._wrong_every, self._num_tokens = known, wrong_every, num_tokens

    def draft(self, sequence: EngineSequence, limit: int) -> Draft:
        start = sequence.num_output
        right = self._known[start : start + min(limit, self._num_tokens)]
        return tuple(
            (token + 1) % VOCAB if (start + index) % self._wrong_every == 0 else token
            for index, token in enumerate(right)
        )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(path, dtype=torch.float32, mlp_only_layers=[1], attention_bias=True, vocab_size=VOCAB)
    spec = load_spec(ModelConfig(path=path))
    checkpoint = Checkpoint(path)
    with one_torch_thread():
        yield {"spec": spec, "checkpoint": checkpoint, "experts": PlainExperts(spec, checkpoint)}


@pytest.fixture
def drafting(parts: dict[str, Any]) -> Callable[..., LocalEngine]:
    """An engine with a drafter."""

    def make(drafter: Any, **config: Any) -> LocalEngine:
        with mock.patch("expertmesh.attention_server.half.open_drafter", return_value=drafter):
            return LocalEngine(**parts, **config)

    return make


def plain(parts: dict[str, Any], prompt: list[int], **options: Any) -> list[Output]:
    engine = LocalEngine(**parts)
    engine.submit(1, prompt, **options)
    engine.run()
    return engine.outputs[1]


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [output.token for output in outputs if output.token is not None]


@pytest.mark.parametrize(("kind", "wrong_every"), [*((kind, 3) for kind in OPTIONS), ("greedy", 1), ("sampled", 1000)])
def test_same_output_whatever_is_drafted(
    parts: dict[str, Any], drafting: Callable[..., LocalEngine], kind: str, wrong_every: int
) -> None:
    options = OPTIONS[kind]
    expected = plain(parts, PROMPT, max_tokens=13, **options)
    engine = drafting(Oracle(tokens_of(expected), wrong_every))
    engine.submit(1, PROMPT, max_tokens=13, **options)
    steps = engine.run()
    assert tokens_of(engine.outputs[1]) == tokens_of(expected)
    assert [output.finish for output in engine.outputs[1]] == [output.finish for output in expected]
    for output, wanted in zip(engine.outputs[1], expected, strict=True):
        if wanted.logprobs is not None and output.logprobs is not None:
            assert output.logprobs.top_ids == wanted.logprobs.top_ids
            assert output.logprobs.chosen == pytest.approx(wanted.logprobs.chosen, abs=1e-4)
        else:
            assert output.logprobs is wanted.logprobs
    # Each draft wrong from its first token on; now and then two tokens right; 4 tokens a step.
    assert steps == {1: 13, 3: 5, 1000: 4}[wrong_every]
    assert engine.load.kv_cache_usage == 0
    assert engine.load.outstanding_tokens == 0


def test_a_traced_sequence_is_told_what_became_of_its_drafts(
    parts: dict[str, Any], drafting: Callable[..., LocalEngine]
) -> None:
    known = tokens_of(plain(parts, PROMPT, max_tokens=13))
    metrics = Metrics(role="attention")
    engine = drafting(Oracle(known, 3), telemetry=Telemetry(NoOpTracer(), metrics))
    trace = mock.create_autospec(RequestTrace, instance=True, traceparent="")
    engine.submit(1, PROMPT, trace=trace, max_tokens=13)
    engine.run()
    told = [call.args for call in trace.speculated.call_args_list]
    assert sum(drafted for drafted, _ in told) == metrics.spec_decode_num_draft_tokens.labels().read()
    assert sum(right for _, right in told) == metrics.spec_decode_num_accepted_tokens.labels().read() > 0


def test_end_among_accepted_tokens_drops_those_behind_it(
    parts: dict[str, Any], drafting: Callable[..., LocalEngine]
) -> None:
    free = tokens_of(plain(parts, PROMPT, max_tokens=20))
    end = next(index for index in range(2, 20) if free[index] not in free[:index] and index % 4 != 3)
    ends: dict[str, Any] = {"end_ids": frozenset({free[end]}), "max_tokens": 20}
    expected = plain(parts, PROMPT, **ends)
    engine = drafting(Oracle(free, 1000))
    engine.submit(1, PROMPT, **ends)
    engine.run()
    assert tokens_of(engine.outputs[1]) == tokens_of(expected) == free[: end + 1]
    assert engine.outputs[1][-1].finish == generate_pb2.FINISH_REASON_STOP
    assert engine.outputs[1][-1].matched_id == free[end]
    assert engine.load.kv_cache_usage == 0


def test_least_number_of_tokens_holds_among_drafts(parts: dict[str, Any], drafting: Callable[..., LocalEngine]) -> None:
    free = tokens_of(plain(parts, PROMPT, max_tokens=12))
    ends: dict[str, Any] = {"end_ids": frozenset({free[0], free[2]}), "min_tokens": 6, "max_tokens": 12}
    expected = tokens_of(plain(parts, PROMPT, **ends))
    engine = drafting(Oracle(free, 4))
    engine.submit(1, PROMPT, **ends)
    engine.run()
    assert engine.tokens(1) == expected
    assert not {free[0], free[2]} & set(expected[:5])


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_no_token_too_many(parts: dict[str, Any], drafting: Callable[..., LocalEngine], max_tokens: int) -> None:
    known = tokens_of(plain(parts, PROMPT, max_tokens=16))
    engine = drafting(Oracle(known, 1000))
    engine.submit(1, PROMPT, max_tokens=max_tokens)
    engine.run()
    assert engine.tokens(1) == known[:max_tokens]


def test_broken_step_is_repeated_without_a_trace(parts: dict[str, Any], drafting: Callable[..., LocalEngine]) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.8}
    expected = tokens_of(plain(parts, PROMPT, **options))
    engine = drafting(Oracle(expected, 3))
    engine.submit(1, PROMPT, **options)
    engine.run_with_breaks()
    assert engine.tokens(1) == expected


def test_other_sequence_is_aborted_under_a_prepared_draft(
    parts: dict[str, Any], drafting: Callable[..., LocalEngine]
) -> None:
    expected = tokens_of(plain(parts, PROMPT))
    engine = drafting(Oracle(expected, 3))
    engine.submit(1, PROMPT)
    engine.submit(2, PROMPT)
    engine.step()
    engine.half.prepare()
    engine.half.engine.post(Abort(1, 2))
    engine.run()
    assert engine.tokens(1) == expected
    assert engine.load.kv_cache_usage == 0


def test_replay_goes_on_as_if_nothing_had_happened(parts: dict[str, Any], drafting: Callable[..., LocalEngine]) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 8, "presence_penalty": 0.5}
    expected = tokens_of(plain(parts, PROMPT, **options))
    for num_known in (1, 6):
        engine = drafting(Oracle(expected, 4))
        engine.submit(1, PROMPT, output=expected[:num_known], **options)
        engine.run()
        assert engine.tokens(1) == expected[num_known:]


@pytest.mark.slow
@pytest.mark.parametrize(("caching", "micro_batches"), [(True, 2), (False, 1)])
def test_few_blocks_and_small_steps(
    parts: dict[str, Any], drafting: Callable[..., LocalEngine], caching: bool, micro_batches: int
) -> None:
    """Chunked prefill, preemptions and drafts together."""
    prompts = [[(7 * i + j * j) % VOCAB for j in range(9 + i)] for i in range(5)]
    expected = [tokens_of(plain(parts, prompt, max_tokens=14)) for prompt in prompts]
    engine = drafting(
        ByPrompt({tuple(prompt): Oracle(known, 3) for prompt, known in zip(prompts, expected, strict=True)}),
        num_kv_blocks=16,
        block_size=4,
        max_num_batched_tokens=10,
        enable_prefix_caching=caching,
        micro_batches=micro_batches,
    )
    for handle, prompt in enumerate(prompts):
        engine.submit(handle, prompt, max_tokens=14)
    engine.run()
    assert [engine.tokens(handle) for handle in range(len(prompts))] == expected
    assert engine.half.engine.counts.preemptions > 0
    assert engine.load.kv_cache_usage == 0


class ByPrompt:
    def __init__(self, drafters: dict[tuple[int, ...], Oracle]) -> None:
        self._drafters = drafters

    def draft(self, sequence: EngineSequence, limit: int) -> Draft:
        return self._drafters[tuple(sequence.tokens[: sequence.num_prompt].tolist())].draft(sequence, limit)


def test_known_tokens_do_not_wait_for_drafts(parts: dict[str, Any], drafting: Callable[..., LocalEngine]) -> None:
    known = tokens_of(plain(parts, PROMPT))
    engine = drafting(Oracle(known, 1000), max_num_batched_tokens=8)
    for handle in range(6):
        engine.submit(handle, PROMPT)
    while min(len(engine.tokens(handle)) for handle in range(6)) == 0:
        engine.step()
    before = [len(engine.tokens(handle)) for handle in range(6)]
    assert engine.step() == 8
    after = [len(engine.tokens(handle)) for handle in range(6)]
    assert all(new > old for old, new in zip(before, after, strict=True))
    assert sum(after) - sum(before) == 8


def test_prefix_cache_holds_verified_tokens_only(parts: dict[str, Any], drafting: Callable[..., LocalEngine]) -> None:
    expected = tokens_of(plain(parts, PROMPT, max_tokens=24))
    engine = drafting(Oracle(expected, 2), block_size=4)
    engine.submit(1, PROMPT, max_tokens=24)
    engine.run()
    tokens = np.array([*PROMPT, *expected], np.int64)
    known: list[bytes] = []
    chain_digests(tokens, 4, known, len(tokens) - 1)
    published = engine.half.engine._blocks._by_digest
    assert published
    assert set(published) <= set(known)
    engine.submit(2, [*PROMPT, *expected[:20]], max_tokens=4)
    engine.run()
    assert engine.outputs[2][0].cached_tokens >= 20
    assert engine.tokens(2) == expected[20:24]


@pytest.mark.parametrize("wrong_every", [2, 1000])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_constrained_output(
    parts: dict[str, Any],
    drafting: Callable[..., LocalEngine],
    tmp_path: Path,
    wrong_every: int,
    options: dict[str, Any],
) -> None:
    """Each row is masked by what its draft leaves; a draft that does not fit is wrong."""
    compiler = ConstraintCompiler(write_tokenizer(tmp_path / "tokenizer.json"), VOCAB, [EOS])
    constraint = Constraint("regex", "(ab|c){3,9}[0-9]{2}")

    def answer(engine: LocalEngine) -> list[Output]:
        engine.submit(1, PROMPT, max_tokens=30, end_ids=frozenset({EOS}), **options)
        sequence = engine.half.engine._inbox[-1]
        assert isinstance(sequence, EngineSequence)
        sequence.matcher = compiler.matcher(constraint, [], ignore_eos=False)
        engine.run()
        return engine.outputs[1]

    expected = answer(LocalEngine(**parts))
    engine = drafting(Oracle([*tokens_of(expected), 5, 6, 7], wrong_every))
    assert [(output.token, output.finish) for output in answer(engine)] == [
        (output.token, output.finish) for output in expected
    ]
    assert expected[-1].finish == generate_pb2.FINISH_REASON_STOP
    assert engine.load.kv_cache_usage == 0


def test_request_without_drafts(parts: dict[str, Any], drafting: Callable[..., LocalEngine]) -> None:
    known = tokens_of(plain(parts, PROMPT))
    engine = drafting(Oracle(known, 1000))
    engine.submit(1, PROMPT, speculates=False)
    assert engine.run() == len(known)
    assert engine.tokens(1) == known


def test_prompt_lookup_and_its_metrics(parts: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "logit_bias": dict.fromkeys(REPEATING[:2], 20.0)}
    expected = tokens_of(plain(parts, REPEATING, **options))
    metrics = Metrics()
    engine = LocalEngine(**parts, telemetry=Telemetry(NoOpTracer(), metrics), speculation={"method": "ngram"})
    engine.submit(1, REPEATING, **options)
    steps = engine.run()
    assert engine.tokens(1) == expected
    assert steps < 24 / 2, "of two tokens that take turns most drafts are right"
    drafted, accepted = metrics.spec_decode_num_draft_tokens, metrics.spec_decode_num_accepted_tokens
    assert accepted.labels().read() == 24 - steps
    assert metrics.generation_tokens.labels().read() == 24
    assert 0 < metrics.spec_decode_num_drafts.labels().read() <= steps
    rate = accepted.labels().read() / drafted.labels().read()
    assert metrics.spec_decode_acceptance_rate.labels().read() == pytest.approx(rate)


def test_graphs_of_a_gpu_verify_no_drafts(parts: dict[str, Any]) -> None:
    config = MeshConfig(speculation=SpeculationConfig(method="ngram"))
    with pytest.raises(UserError, match="is 'ngram', and ranks on a GPU"):
        AttentionServer(config, parts["spec"], parts["checkpoint"], disabled_telemetry(), torch.device("cuda"))


def test_configuration_is_checked() -> None:
    assert (SpeculationConfig(method="ngram").max_tokens, SpeculationConfig(method="mtp").max_tokens) == (4, 1)
    with pytest.raises(ValueError, match="num_speculative_tokens is 2 and method is mtp"):
        SpeculationConfig(method="mtp", num_speculative_tokens=2)
    assert SpeculationConfig.model_validate({"method": False}).method == "off"
    with pytest.raises(ValueError, match="prompt_lookup_max is 2, less than prompt_lookup_min = 3"):
        SpeculationConfig(prompt_lookup_min=3, prompt_lookup_max=2)
