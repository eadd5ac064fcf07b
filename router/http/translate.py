"""Bodies of OpenAI's API to requests of the mesh, one for each choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from expertmesh.router.errors import invalid
from expertmesh.router.http.schema import ChatBody, ChatMessageBody, CompletionBody, GenerationBody, Prompt
from expertmesh.v1 import generate_pb2

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "stop_token_ids"),
)


def completion_requests(body: CompletionBody, max_choices: int) -> list[generate_pb2.GenerateRequest]:
    """In the order of the choices: those of the first prompt first.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the parameter.
    """
    if body.echo:
        raise invalid("echo", "is true", "leave it out, and put the prompt before the text yourself")
    if body.suffix:
        raise invalid("suffix", "is set", "leave it out: models here only go on from a prompt")
    if body.best_of is not None and body.best_of != body.num_choices:
        raise invalid("best_of", f"is {body.best_of} and n is {body.num_choices}", "leave it out: n choices are made")
    prompts = _prompts(body.prompt)
    _check_choices(len(prompts) * body.num_choices, max_choices)
    sampling = _sampling(body)
    sampling.max_tokens = _DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        sampling.logprobs = body.logprobs
    requests = []
    for prompt in prompts:
        request = _request(body, sampling)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokenized.input_ids.extend(_ids(prompt))
        requests += _choices(request, body)
    return requests


def chat_requests(body: ChatBody, max_choices: int) -> list[generate_pb2.GenerateRequest]:
    """
    Raises:
        Refusal: INVALID_ARGUMENT, naming the parameter.
    """
    _check_choices(body.num_choices, max_choices)
    sampling = _sampling(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", f"is {body.top_logprobs} and logprobs is not true", "set logprobs to true")
    if body.logprobs:
        sampling.logprobs = body.top_logprobs or 0
    request = _request(body, sampling)
    request.chat.CopyFrom(_chat(body))
    return _choices(request, body)


def _chat(body: ChatBody) -> generate_pb2.ChatInput:
    chat = generate_pb2.ChatInput(messages=[_message(index, message) for index, message in enumerate(body.messages)])
    if body.tool_choice not in (None, "none", "auto"):
        raise invalid(
            "tool_choice",
            f"is {json.dumps(body.tool_choice)[:80]}",
            "use none or auto; a call can be enforced with response_format json_schema",
        )
    if body.tool_choice != "none":
        for index, tool in enumerate(body.tools or ()):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
                remedy = 'send {"type": "function", "function": {"name": ...}}'
                raise invalid(f"tools[{index}]", "is no function", remedy)
            chat.tools.append(json.dumps(tool))
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    if variables:
        chat.template_kwargs = json.dumps(variables)
    return chat


def _message(index: int, message: ChatMessageBody) -> generate_pb2.ChatMessage:
    return generate_pb2.ChatMessage(
        role=message.role,
        content=_content(index, message),
        name=message.name or "",
        tool_calls=[
            generate_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or ()
        ],
        tool_call_id=message.tool_call_id or "",
    )


def _content(index: int, message: ChatMessageBody) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            field = f"messages[{index}].content[{number}]"
            raise invalid(field, f"is of type {part.type!r}", "send text: models here read nothing else")
    return "\n".join(part.text or "" for part in message.content)


def _prompts(value: Any) -> Sequence[Prompt]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", "is no prompt", "send a text, token ids, or a list of either")
    if _is_ids(value):
        return [value]
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _is_ids(prompt)):
            raise invalid(f"prompt[{index}]", "is no prompt", "send texts or lists of token ids")
    return value


def _is_ids(value: list[Any]) -> bool:
    return all(type(token_id) is int for token_id in value)


def _ids(prompt: list[int]) -> list[int]:
    wrong = [token_id for token_id in prompt if not 0 <= token_id < 2**32]
    if wrong:
        raise invalid("prompt", f"token id {wrong[0]} is out of range", "send ids from 0")
    return prompt


def _check_choices(number: int, max_choices: int) -> None:
    if number > max_choices:
        remedy = f"ask for at most {max_choices} (router.http.max_choices)"
        raise invalid("n", f"with the prompts it makes {number} choices", remedy)


def _request(body: GenerationBody, sampling: generate_pb2.SamplingParams) -> generate_pb2.GenerateRequest:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "is set and stream is not true", "leave it out or set stream")
    return generate_pb2.GenerateRequest(
        sampling_params=sampling, model=body.model, priority=body.priority or 0, tenant=body.user or ""
    )


def _choices(request: generate_pb2.GenerateRequest, body: GenerationBody) -> list[generate_pb2.GenerateRequest]:
    """``n`` of them; with a seed, choice ``i`` is what the seed + i gives."""
    requests = []
    for index in range(body.num_choices):
        choice = generate_pb2.GenerateRequest()
        choice.CopyFrom(request)
        if body.seed is not None:
            choice.sampling_params.seed = (body.seed + index + 2**63) % 2**64 - 2**63
        requests.append(choice)
    return requests


def _sampling(body: GenerationBody) -> generate_pb2.SamplingParams:
    given = {name: getattr(body, name) for name in _SAME_NAMES}
    sampling = generate_pb2.SamplingParams(**{name: value for name, value in given.items() if value is not None})
    if body.stop is not None:
        sampling.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop)
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < 2**32):
            raise invalid("logit_bias", f"{token[:40]!r} is no token id", "use token ids as keys")
        sampling.logit_bias[int(token)] = bias
    _constrain(sampling, body)
    return sampling


def _constrain(sampling: generate_pb2.SamplingParams, body: GenerationBody) -> None:
    form, outputs = body.response_format, body.structured_outputs
    is_formed = form is not None and form.type != "text"
    if is_formed and outputs is not None:
        raise invalid("structured_outputs", "is set beside response_format", "leave one of them out")
    if form is not None and form.type == "json_object":
        sampling.json_object = True
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise invalid("response_format.json_schema", "is missing", 'send {"name": ..., "schema": ...}')
        sampling.json_schema = json.dumps(form.json_schema.schema_)
    if outputs is None:
        return
    given = outputs.model_dump(exclude_none=True)
    if len(given) != 1:
        raise invalid("structured_outputs", f"has {len(given)} constraints", "send one")
    if outputs.json_ is not None:
        sampling.json_schema = outputs.json_ if isinstance(outputs.json_, str) else json.dumps(outputs.json_)
    elif outputs.choice is not None:
        sampling.choice.choices.extend(outputs.choice)
    elif outputs.regex is not None:
        sampling.regex = outputs.regex
    elif outputs.grammar is not None:
        sampling.grammar = outputs.grammar
    else:
        sampling.json_object = bool(outputs.json_object)
