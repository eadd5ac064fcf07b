"""Requests of ``vllm.grpc.engine.VllmEngine`` to requests of the mesh."""

from __future__ import annotations

from typing import Any

from expertmesh.router.errors import invalid
from expertmesh.v1 import generate_pb2

MAX_CHOICES = 64
_SAME_NAMES = (
    *("min_p", "frequency_penalty", "presence_penalty", "ignore_eos", "include_stop_str_in_output", "stop"),
    "stop_token_ids",
)
_NOT_SERVED = (
    *("mm_inputs", "extra_mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json"),
    "data_parallel_rank",
)


def to_requests(asked: Any) -> list[generate_pb2.GenerateRequest]:
    """One for each of its ``n`` choices; choice ``i`` of a seeded request has the seed + i.

    Args:
        asked: ``vllm.grpc.engine.GenerateRequest``.

    Raises:
        Refusal: INVALID_ARGUMENT for what a mesh cannot do.
    """
    given = {field.name for field, _ in asked.ListFields()}
    if refused := [name for name in _NOT_SERVED if name in given]:
        raise invalid(refused[0], "is set", "leave it out: a mesh serves text, and places requests itself")
    params = asked.sampling_params
    choices = params.n or 1
    if choices > MAX_CHOICES:
        raise invalid("sampling_params.n", f"is {choices}", f"ask for at most {MAX_CHOICES}")
    requests = []
    for index in range(choices):
        request_id = asked.request_id if choices == 1 or not asked.request_id else f"{asked.request_id}-{index}"
        request = generate_pb2.GenerateRequest(request_id=request_id, sampling_params=_sampling(params))
        match asked.WhichOneof("input"):
            case "tokenized":
                request.tokenized.input_ids.extend(asked.tokenized.input_ids)
            case "text":
                request.text = asked.text
        if params.HasField("seed"):
            request.sampling_params.seed = params.seed + index
        requests.append(request)
    return requests


def _sampling(params: Any) -> generate_pb2.SamplingParams:
    """What is 0 because nobody set it means vLLM's neutral value, and never the model's default."""
    if params.HasField("prompt_logprobs"):
        raise invalid("sampling_params.prompt_logprobs", "is set", "leave it out: only outputs have log probabilities")
    if params.HasField("truncate_prompt_tokens"):
        raise invalid("sampling_params.truncate_prompt_tokens", "is set", "send a prompt that fits")
    sampling = generate_pb2.SamplingParams(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p or 1.0,
        repetition_penalty=params.repetition_penalty or 1.0,
        top_k=_int32("sampling_params.top_k", params.top_k),
        min_tokens=_int32("sampling_params.min_tokens", params.min_tokens),
        **{name: getattr(params, name) for name in _SAME_NAMES},
    )
    if params.HasField("max_tokens"):
        sampling.max_tokens = _int32("sampling_params.max_tokens", params.max_tokens)
    if params.HasField("logprobs"):
        sampling.logprobs = params.logprobs
    for token_id, bias in params.logit_bias.items():
        if token_id < 0:
            raise invalid("sampling_params.logit_bias", f"token id {token_id} is negative", "use ids from 0")
        sampling.logit_bias[token_id] = bias
    _constrain(sampling, params)
    return sampling


def _constrain(sampling: generate_pb2.SamplingParams, params: Any) -> None:
    match params.WhichOneof("constraint"):
        case None:
            return
        case "structural_tag":
            raise invalid("sampling_params.structural_tag", "is set", "use json_schema, regex, grammar or choice")
        case "choice":
            sampling.choice.choices.extend(params.choice.choices)
        case name:
            setattr(sampling, name, getattr(params, name))


def _int32(field: str, value: int) -> int:
    if value >= 2**31:
        raise invalid(field, f"is {value}", f"use at most {2**31 - 1}")
    return value
