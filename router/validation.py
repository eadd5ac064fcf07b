"""What a request may hold. Pure functions: they return resolved values or raise ``Refusal``.

Nothing that passes here is left for an attention server to guess or to check: every unset option has become the model's
default, and the seed is fixed, so that a replay on another attention server continues with the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from expertmesh.router.errors import Refusal, invalid
from expertmesh.v1 import generate_pb2

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_LOGIT_BIAS_VALUE = 100.0
MAX_PENALTY = 2.0
REPETITION_PENALTY_RANGE = (0.125, 8.0)  # exact in float32, and harmless to any logit
MAX_PRIORITY = 1_000_000
MAX_NAME_CHARS = 256
GREEDY_BELOW = 1e-5  # a temperature below it is greedy, as in vLLM: dividing logits by it overflows


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What an unset option means: the model's ``generation_config.json``, or the neutral value where that is silent."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What validation needs to know of the served model."""

    name: str
    vocab_size: int
    max_model_len: int
    defaults: SamplingDefaults


def check_name(field: str, value: str) -> None:
    """Ids that clients choose end in logs, spans and metadata: short and printable."""
    if len(value) > MAX_NAME_CHARS:
        raise invalid(field, f"has {len(value)} characters", f"use at most {MAX_NAME_CHARS}")
    if not value.isprintable():
        raise invalid(field, f"{value!r} holds characters that cannot be printed", "use printable characters")


def check_model(model: str, limits: ModelLimits) -> None:
    """Raises NOT_FOUND unless ``model`` is empty or the served model's name."""
    if model not in ("", limits.name):
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            f"model: {model[:MAX_NAME_CHARS]!r} is not served here; ask for {limits.name!r} or leave the field empty",
            field="model",
        )


def check_priority(priority: int) -> None:
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise invalid(
            "priority", f"is {priority}", f"use a value in [-{MAX_PRIORITY}, {MAX_PRIORITY}], smaller runs first"
        )


def check_prompt_bytes(field: str, num_bytes: int, max_prompt_bytes: int) -> None:
    """The cheap check before anything is tokenised or copied."""
    if num_bytes > max_prompt_bytes:
        raise invalid(
            field,
            f"the prompt has {num_bytes} bytes",
            f"send at most {max_prompt_bytes} (router.max_prompt_bytes)",
        )


def check_prompt_ids(field: str, token_ids: Sequence[int], limits: ModelLimits) -> None:
    """The prompt is not empty, leaves room for one token, and every id has a row in the embedding.

    Args:
        field: the input's name in the request: ``text``, ``tokenized.input_ids``, ``chat``.
    """
    if not token_ids:
        raise invalid(field, "the prompt is empty", "send at least one token")
    check_prompt_length(field, len(token_ids), limits)
    largest = max(token_ids)
    if largest >= limits.vocab_size:
        position = token_ids.index(largest)
        raise invalid(
            field,
            f"token id {largest} at position {position} is out of range",
            f"use ids in [0, {limits.vocab_size - 1}]",
        )


def check_prompt_length(field: str, num_tokens: int, limits: ModelLimits, *, at_least: str = "") -> None:
    if num_tokens >= limits.max_model_len:
        raise invalid(
            field,
            f"the prompt has {at_least}{num_tokens} tokens and max_model_len is {limits.max_model_len}",
            f"send at most {limits.max_model_len - 1} tokens, so that one can be generated",
        )


def resolve_sampling(
    params: generate_pb2.SamplingParams,
    limits: ModelLimits,
    *,
    num_prompt_tokens: int,
    choose_seed: Callable[[], int],
) -> generate_pb2.SamplingParams:
    """A copy of ``params`` in which every option is set and lies in its range.

    ``max_tokens`` is cut to what fits in ``max_model_len``; a temperature below ``GREEDY_BELOW`` becomes 0; ``top_k``
    -1 becomes 0 (off). ``logprobs`` alone stays unset where it was, which means none.

    Raises:
        Refusal: INVALID_ARGUMENT naming the field, its value and the remedy.
    """
    resolved = generate_pb2.SamplingParams()
    resolved.CopyFrom(params)
    _resolve_filters(resolved, params, limits.defaults)
    _resolve_penalties(resolved, params, limits.defaults)
    _resolve_lengths(resolved, params, limits.max_model_len - num_prompt_tokens)
    _check_stops(params, limits)
    _check_logprobs_and_bias(params, limits)
    if params.WhichOneof("constraint") == "json_object" and not params.json_object:
        resolved.ClearField("json_object")
    resolved.seed = params.seed if params.HasField("seed") else choose_seed()
    resolved.skip_special_tokens = params.skip_special_tokens if params.HasField("skip_special_tokens") else True
    resolved.ignore_eos = params.ignore_eos
    resolved.include_stop_str_in_output = params.include_stop_str_in_output
    return resolved


def _resolve_filters(
    resolved: generate_pb2.SamplingParams, params: generate_pb2.SamplingParams, defaults: SamplingDefaults
) -> None:
    temperature = params.temperature if params.HasField("temperature") else defaults.temperature
    if not (math.isfinite(temperature) and temperature >= 0):
        raise invalid("sampling_params.temperature", f"is {temperature:g}", "use a finite value of 0 (greedy) or more")
    resolved.temperature = temperature if temperature >= GREEDY_BELOW else 0.0
    top_p = params.top_p if params.HasField("top_p") else defaults.top_p
    if not 0 < top_p <= 1:
        raise invalid("sampling_params.top_p", f"is {top_p:g}", "use a value in (0, 1], 1 = off")
    resolved.top_p = top_p
    top_k = params.top_k if params.HasField("top_k") else defaults.top_k
    if top_k < -1:
        raise invalid("sampling_params.top_k", f"is {top_k}", "use 1 or more, or 0 or -1 for off")
    resolved.top_k = max(0, top_k)
    min_p = params.min_p if params.HasField("min_p") else defaults.min_p
    if not 0 <= min_p <= 1:
        raise invalid("sampling_params.min_p", f"is {min_p:g}", "use a value in [0, 1], 0 = off")
    resolved.min_p = min_p


def _resolve_penalties(
    resolved: generate_pb2.SamplingParams, params: generate_pb2.SamplingParams, defaults: SamplingDefaults
) -> None:
    for name, value in (("frequency", params.frequency_penalty), ("presence", params.presence_penalty)):
        if not -MAX_PENALTY <= value <= MAX_PENALTY:
            raise invalid(
                f"sampling_params.{name}_penalty",
                f"is {value:g}",
                f"use a value in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], 0 = off",
            )
    resolved.frequency_penalty = params.frequency_penalty
    resolved.presence_penalty = params.presence_penalty
    lowest, highest = REPETITION_PENALTY_RANGE
    repetition = params.repetition_penalty if params.HasField("repetition_penalty") else defaults.repetition_penalty
    if not lowest <= repetition <= highest:
        raise invalid(
            "sampling_params.repetition_penalty",
            f"is {repetition:g}",
            f"use a value in [{lowest:g}, {highest:g}], 1 = off",
        )
    resolved.repetition_penalty = repetition


def _resolve_lengths(
    resolved: generate_pb2.SamplingParams, params: generate_pb2.SamplingParams, num_tokens_that_fit: int
) -> None:
    max_tokens = num_tokens_that_fit
    if params.HasField("max_tokens"):
        if params.max_tokens <= 0:
            raise invalid(
                "sampling_params.max_tokens",
                f"is {params.max_tokens}",
                "use 1 or more, or leave it out for as many as fit in max_model_len",
            )
        max_tokens = min(params.max_tokens, num_tokens_that_fit)
    if params.min_tokens < 0:
        raise invalid("sampling_params.min_tokens", f"is {params.min_tokens}", "use 0 or more")
    if params.min_tokens > max_tokens:
        raise invalid(
            "sampling_params.min_tokens",
            f"is {params.min_tokens}, more than the {max_tokens} tokens that may be generated",
            "lower it, raise sampling_params.max_tokens, or send a shorter prompt",
        )
    resolved.max_tokens = max_tokens
    resolved.min_tokens = params.min_tokens


def _check_stops(params: generate_pb2.SamplingParams, limits: ModelLimits) -> None:
    if len(params.stop) > MAX_STOP_STRINGS:
        raise invalid("sampling_params.stop", f"has {len(params.stop)} strings", f"send at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(params.stop):
        if not stop:
            raise invalid(f"sampling_params.stop[{index}]", "is empty", "leave it out")
        if len(stop) > MAX_STOP_STRING_CHARS:
            raise invalid(
                f"sampling_params.stop[{index}]",
                f"has {len(stop)} characters",
                f"use at most {MAX_STOP_STRING_CHARS}",
            )
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise invalid(
            "sampling_params.stop_token_ids",
            f"has {len(params.stop_token_ids)} ids",
            f"send at most {MAX_STOP_TOKEN_IDS}",
        )
    for token_id in params.stop_token_ids:
        _check_token_id("sampling_params.stop_token_ids", token_id, limits)


def _check_logprobs_and_bias(params: generate_pb2.SamplingParams, limits: ModelLimits) -> None:
    if params.HasField("logprobs") and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise invalid(
            "sampling_params.logprobs", f"is {params.logprobs}", f"use a value in [0, {MAX_LOGPROBS}] or leave it out"
        )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise invalid(
            "sampling_params.logit_bias", f"has {len(params.logit_bias)} entries", f"send at most {MAX_LOGIT_BIAS}"
        )
    for token_id, bias in params.logit_bias.items():
        _check_token_id("sampling_params.logit_bias", token_id, limits)
        if not -MAX_LOGIT_BIAS_VALUE <= bias <= MAX_LOGIT_BIAS_VALUE:
            raise invalid(
                f"sampling_params.logit_bias[{token_id}]",
                f"is {bias:g}",
                f"use a value in [-{MAX_LOGIT_BIAS_VALUE:g}, {MAX_LOGIT_BIAS_VALUE:g}]",
            )


def _check_token_id(field: str, token_id: int, limits: ModelLimits) -> None:
    if token_id >= limits.vocab_size:
        raise invalid(field, f"token id {token_id} is out of range", f"use ids in [0, {limits.vocab_size - 1}]")
