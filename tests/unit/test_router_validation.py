"""What a request may hold: every wrong value is refused by name, every right one is resolved."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.router import validation
from expertmesh.router.errors import Refusal
from expertmesh.router.validation import ModelLimits, SamplingDefaults, resolve_sampling
from expertmesh.v1.generate_pb2 import SamplingParams

LIMITS = ModelLimits(
    name="tiny", vocab_size=100, max_model_len=50, defaults=SamplingDefaults(temperature=0.5, top_p=0.75, top_k=7)
)
NAN, INF = math.nan, math.inf


def resolve(num_prompt_tokens: int = 10, **fields: Any) -> SamplingParams:
    return resolve_sampling(
        SamplingParams(**fields), LIMITS, num_prompt_tokens=num_prompt_tokens, choose_seed=lambda: 2**62 + 1
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.01, NAN, INF, -INF)),
        *(("top_p", value) for value in (0, -1, 1.01, NAN)),
        ("top_k", -2),
        *(("min_p", value) for value in (-0.1, 1.1, NAN)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN, INF)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("repetition_penalty", value) for value in (0, -1, 1e-3, 9, NAN, INF)),
        *(("max_tokens", value) for value in (0, -1)),
        *(("min_tokens", value) for value in (-1, 41)),
        *(("stop", value) for value in (["x"] * 100, ["ok", ""], ["x" * 1025])),
        *(("stop_token_ids", value) for value in ([100], list(range(100)) + [0] * 29)),
        *(("logprobs", value) for value in (-1, 21)),
        *(("logit_bias", value) for value in ({100: 1.0}, {1: 101.0}, {1: -101.0}, {1: NAN})),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(Refusal, match=rf"sampling_params\.{field}.*; ") as refused:
        resolve(**{field: value})
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_too_much_logit_bias_is_refused() -> None:
    limits = ModelLimits(name="big", vocab_size=10_000, max_model_len=50, defaults=SamplingDefaults())
    params = SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))
    with pytest.raises(Refusal, match="1025 entries"):
        resolve_sampling(params, limits, num_prompt_tokens=1, choose_seed=lambda: 0)


def test_unset_options_get_the_models_defaults() -> None:
    resolved = resolve()
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p) == (0.5, 0.75, 7, 0)
    assert (resolved.repetition_penalty, resolved.frequency_penalty, resolved.presence_penalty) == (1, 0, 0)
    assert (resolved.max_tokens, resolved.min_tokens, resolved.seed) == (40, 0, 2**62 + 1)
    assert (resolved.skip_special_tokens, resolved.ignore_eos, resolved.include_stop_str_in_output) == (
        True,
        False,
        False,
    )
    assert not resolved.HasField("logprobs")


def test_every_option_but_logprobs_is_set() -> None:
    resolved = resolve()
    optional = {field.name for field in SamplingParams.DESCRIPTOR.fields if field.has_presence}
    constraints = {field.name for field in SamplingParams.DESCRIPTOR.oneofs_by_name["constraint"].fields}
    assert optional - {field.name for field, _ in resolved.ListFields()} == {"logprobs"} | constraints


def test_given_options_stay() -> None:
    given_ = SamplingParams(
        temperature=0,
        top_p=1,
        top_k=3,
        min_p=0.25,
        repetition_penalty=1.25,
        max_tokens=5,
        min_tokens=5,
        seed=-3,
        logprobs=0,
        skip_special_tokens=False,
        stop=["a"],
        stop_token_ids=[99],
        logit_bias={0: -100},
        frequency_penalty=2,
        presence_penalty=-2,
        ignore_eos=True,
        include_stop_str_in_output=True,
    )
    resolved = resolve_sampling(given_, LIMITS, num_prompt_tokens=1, choose_seed=lambda: 0)
    assert resolved == given_


def test_edges() -> None:
    assert resolve(max_tokens=1000).max_tokens == 40
    assert resolve(top_k=-1).top_k == 0
    assert resolve(temperature=1e-6).temperature == 0
    assert resolve(num_prompt_tokens=49).max_tokens == 1


@pytest.mark.parametrize(
    ("ids", "problem"),
    [([], "empty"), ([1] * 50, "50 tokens and max_model_len is 50"), ([5, 100, 3], "token id 100 at position 1")],
)
def test_wrong_prompts_are_refused(ids: list[int], problem: str) -> None:
    with pytest.raises(Refusal, match=problem) as refused:
        validation.check_prompt_ids("tokenized.input_ids", ids, LIMITS)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.message.startswith("tokenized.input_ids: ")


def test_longest_prompt_passes() -> None:
    validation.check_prompt_ids("text", [99] * 49, LIMITS)


def test_envelope() -> None:
    validation.check_model("", LIMITS)
    validation.check_model("tiny", LIMITS)
    with pytest.raises(Refusal, match="'huge' is not served here; ask for 'tiny'") as refused:
        validation.check_model("huge", LIMITS)
    assert refused.value.code is grpc.StatusCode.NOT_FOUND
    for priority in (-(2**31), 2**31 - 1):
        with pytest.raises(Refusal, match="priority"):
            validation.check_priority(priority)
    for name in ("x" * 257, "a\nb", "\0"):
        with pytest.raises(Refusal, match="request_id"):
            validation.check_name("request_id", name)
    with pytest.raises(Refusal, match=r"router\.max_prompt_bytes"):
        validation.check_prompt_bytes("text", 11, 10)


@given(data=st.binary(max_size=200), num_prompt_tokens=st.integers(1, 49))
def test_any_message_is_resolved_or_refused(data: bytes, num_prompt_tokens: int) -> None:
    params = SamplingParams()
    try:
        params.ParseFromString(data)
    except Exception:  # noqa: BLE001 - not the subject
        return
    _resolved_or_refused(params, num_prompt_tokens)


FLOATS = st.floats(width=32)
INTS = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 60)


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("temperature", "top_p", "min_p"), FLOATS | st.floats(0, 1, width=32)),
            **dict.fromkeys(
                ("frequency_penalty", "presence_penalty", "repetition_penalty"), FLOATS | st.floats(-2, 2, width=32)
            ),
            **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "logprobs"), INTS),
            "stop": st.lists(st.text(max_size=3), max_size=18),
            "stop_token_ids": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 99), max_size=3),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "logit_bias": st.dictionaries(st.integers(0, 120), FLOATS, max_size=2),
        },
    ),
    num_prompt_tokens=st.integers(1, 49),
)
def test_any_fields_are_resolved_or_refused(fields: dict[str, Any], num_prompt_tokens: int) -> None:
    _resolved_or_refused(SamplingParams(**fields), num_prompt_tokens)


def _resolved_or_refused(params: SamplingParams, num_prompt_tokens: int) -> None:
    try:
        resolved = resolve_sampling(params, LIMITS, num_prompt_tokens=num_prompt_tokens, choose_seed=lambda: 1)
    except Refusal as refused:
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017 - a refusal is one of two good ends
        return
    assert 0 <= resolved.temperature < INF
    assert 0 < resolved.top_p <= 1
    assert resolved.top_k >= 0
    assert 1 <= resolved.max_tokens <= LIMITS.max_model_len - num_prompt_tokens
    assert 0 <= resolved.min_tokens <= resolved.max_tokens
    again = resolve_sampling(resolved, LIMITS, num_prompt_tokens=num_prompt_tokens, choose_seed=lambda: 2)
    assert again == resolved
