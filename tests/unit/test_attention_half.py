"""The attention half on a tiny random model: steps, repeats of broken steps, ends, replay, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from expertmesh.attention_server.events import Abort, EndAll, Unlink
from expertmesh.attention_server.outputs import Output
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.v1 import generate_pb2
from support.attention import LocalEngine, PlainExperts, one_torch_thread
from support.checkpoints import write_checkpoint

PROMPT = [5, 9, 200, 31, 44, 7]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(path, dtype=torch.float32, mlp_only_layers=[1], attention_bias=True, vocab_size=64 * 8)
    spec = load_spec(ModelConfig(path=path))
    checkpoint = Checkpoint(path)
    with one_torch_thread():
        yield {"spec": spec, "checkpoint": checkpoint, "experts": PlainExperts(spec, checkpoint)}


def last(engine: LocalEngine, handle: int) -> Output:
    return engine.outputs[handle][-1]


def generate(parts: dict[str, Any], prompt: list[int], **options: Any) -> list[int]:
    engine = LocalEngine(**parts)
    engine.submit(1, prompt, **options)
    engine.run()
    return engine.tokens(1)


def test_length_and_blocks_are_given_back(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT, max_tokens=5)
    assert engine.run() == 5
    assert len(engine.tokens(1)) == 5
    assert last(engine, 1).finish == generate_pb2.FINISH_REASON_LENGTH
    assert engine.load.kv_cache_usage == 0
    assert engine.load.outstanding_tokens == 0


def test_stop_id_ends_the_sequence_and_is_named(parts: dict[str, Any]) -> None:
    free = generate(parts, PROMPT)
    stop = free[3]
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT, end_ids=frozenset({stop}))
    engine.run()
    assert engine.tokens(1) == free[: free.index(stop) + 1]
    assert last(engine, 1).finish == generate_pb2.FINISH_REASON_STOP
    assert last(engine, 1).matched_id == stop
    late = generate(parts, PROMPT, end_ids=frozenset({free[0]}), min_tokens=4)
    assert free[0] not in late[:4]


def test_broken_step_is_repeated_without_a_trace(parts: dict[str, Any]) -> None:
    expected = generate(parts, PROMPT, temperature=1.0, seed=3)
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT, temperature=1.0, seed=3)
    engine.run_with_breaks()
    assert engine.tokens(1) == expected


def test_two_micro_batches_that_break_anywhere_are_repeated(parts: dict[str, Any]) -> None:
    """Each has the whole chunks of some sequences, and samples of both are put together again."""
    outputs = []
    for micro_batches in (1, 2):
        engine = LocalEngine(**parts, micro_batches=micro_batches, max_num_batched_tokens=9)
        for handle in range(3):
            engine.submit(handle, PROMPT[handle:], temperature=0.7, seed=handle, logprobs=2 * (handle != 1))
        layers, shares = parts["spec"].moe_layers, set()
        while num_tokens := engine.half.prepare():
            for broken in range(len(layers)):
                engine.forward(layers[:broken])
            assert engine.half.prepare() == num_tokens
            batches = [batch.num_tokens for batch in engine.half.micro_batches]
            assert sum(batches) == num_tokens
            assert engine.half.first_tokens == (batches[0] if len(batches) == 2 else 0)
            shares.add(tuple(batches))
            engine.forward()
            engine.half.finish()
        assert ((2, 1) in shares) == (micro_batches == 2), "three sequences that decode"
        outputs.append({handle: [_told(output) for output in found] for handle, found in engine.outputs.items()})
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0]) == 16


def _told(output: Output) -> tuple[Any, ...]:
    found = output.logprobs
    return output.token, output.finish, None if found is None else (round(found.chosen, 3), found.top_ids)


def test_prepared_batch_is_kept_until_it_ran(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT)
    assert engine.half.prepare() == len(PROMPT)
    engine.submit(2, PROMPT)
    assert engine.half.prepare() == len(PROMPT)
    engine.half.engine.post(Abort(1, 1))
    assert engine.half.prepare() == len(PROMPT)
    engine.run()
    assert engine.tokens(1) == []
    assert engine.tokens(2) == generate(parts, PROMPT)


def test_abort_in_the_middle_of_a_step_frees_the_blocks_after_it(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT)
    engine.step()
    engine.half.prepare()
    engine.forward()
    engine.half.engine.post(Abort(1, 1))
    engine.half.engine.tick()
    assert engine.load.kv_cache_usage > 0
    engine.half.finish()
    assert len(engine.tokens(1)) == 1
    assert engine.load.kv_cache_usage == 0


def test_lost_link_ends_its_sequences_only(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT, link=1)
    engine.submit(2, PROMPT, link=2)
    engine.step()
    engine.half.engine.post(Unlink(1))
    engine.run()
    assert len(engine.tokens(1)) == 1
    assert len(engine.tokens(2)) == 16


def test_deadline_passes_with_and_without_steps(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT, timeout_s=5.0)
    engine.submit(2, PROMPT, timeout_s=8.0)
    engine.step()
    engine.now[0] += 6
    engine.step()
    assert last(engine, 1).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert last(engine, 1).message == "the deadline of 5 s passed after 1 output tokens"
    engine.now[0] += 6
    engine.half.engine.tick()
    assert last(engine, 2).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert engine.half.prepare() == 0
    assert engine.load.kv_cache_usage == 0


def test_everything_can_be_ended_with_a_status(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts, max_num_seqs=1)
    engine.submit(1, PROMPT)
    engine.submit(2, PROMPT)
    engine.step()
    engine.half.engine.post(EndAll(grpc.StatusCode.UNAVAILABLE, "bye"))
    engine.half.engine.tick()
    assert [last(engine, handle).code for handle in (1, 2)] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert engine.half.engine.num_active == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_known", [1, 7, 15])
def test_replay_goes_on_as_if_nothing_had_happened(parts: dict[str, Any], temperature: float, num_known: int) -> None:
    options: dict[str, Any] = {
        "temperature": temperature,
        "seed": 11,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
    }
    whole = generate(parts, PROMPT, **options)
    assert generate(parts, PROMPT, output=whole[:num_known], **options) == whole[num_known:]


@pytest.mark.slow
def test_batch_chunks_prefixes_and_preemption_change_no_token(parts: dict[str, Any]) -> None:
    requests: list[tuple[list[int], dict[str, Any]]] = [
        (PROMPT * (1 + number % 4), {"temperature": 0.8 * (number % 3), "seed": number, "top_p": 0.95, "min_p": 0.01})
        for number in range(10)
    ]
    alone = [generate(parts, prompt, **options) for prompt, options in requests]
    configs: list[dict[str, Any]] = [
        {},
        {"max_num_batched_tokens": 7},
        {"enable_prefix_caching": False, "max_num_seqs": 3},
        {"num_kv_blocks": 12, "block_size": 4},
        {"micro_batches": 2, "num_kv_blocks": 12, "block_size": 4, "max_num_batched_tokens": 7},
    ]
    for config in configs:
        engine = LocalEngine(**parts, **config)
        for handle, (prompt, options) in enumerate(requests):
            engine.submit(handle, prompt, **options)
            engine.step()
        engine.run()
        assert [engine.tokens(handle) for handle in range(len(requests))] == alone, config
        assert engine.load.kv_cache_usage == 0


def test_prefix_cache_is_reported(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts, block_size=4)
    for handle in (1, 2):
        engine.submit(handle, PROMPT * 3)
        engine.run()
    assert last(engine, 1).cached_tokens == 0
    assert last(engine, 2).cached_tokens == 16
    assert engine.tokens(1) == engine.tokens(2)


def test_logprobs_belong_to_the_tokens(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT, logprobs=2)
    engine.submit(2, PROMPT)
    engine.run()
    for output in engine.outputs[1]:
        assert output.logprobs is not None
        assert output.logprobs.top_ids[0] == output.token
        assert output.logprobs.top_values[0] == output.logprobs.chosen
    assert all(output.logprobs is None for output in engine.outputs[2])


def test_handle_in_use_is_refused(parts: dict[str, Any]) -> None:
    engine = LocalEngine(**parts)
    engine.submit(1, PROMPT)
    engine.submit(1, PROMPT)
    engine.step()
    assert [output.code for output in engine.outputs[1]] == [grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.OK]


def test_half_without_tokens_takes_part_with_nothing(parts: dict[str, Any]) -> None:
    half = LocalEngine(**parts).half
    assert half.prepare() == 0
    assert not half.micro_batches
    half.finish()
