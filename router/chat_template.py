"""A model's chat template: conversations, with tools and what tools answered, to the text of a prompt."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertmesh.mesh.errors import UserError
from expertmesh.router.errors import invalid
from expertmesh.v1 import generate_pb2

MAX_TEMPLATE_CHARS = 512 * 2**10
_OURS = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """Rendered in a sandbox, as transformers does.

    Args:
        source: Jinja.
        special_tokens: ``bos_token`` and the like, which templates may name.

    Raises:
        UserError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            problem = f"the chat template has {len(source)} characters"
            raise UserError(origin, problem, f"use one of at most {MAX_TEMPLATE_CHARS}")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise UserError(origin, f"the chat template is not valid ({error})", "mend it or remove it") from None
        self.takes_tools = "tools" in variables

    def render(self, chat: generate_pb2.ChatInput) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            Refusal: INVALID_ARGUMENT when a part of it is not JSON, or the template has no place for tools or rejects
                the messages.
        """
        tools = [_object(f"chat.tools[{index}]", text) for index, text in enumerate(chat.tools)]
        if tools and not self.takes_tools:
            raise invalid("chat.tools", "the model's chat template has no place for tools", "leave them out")
        messages = [_message(index, message) for index, message in enumerate(chat.messages)]
        try:
            return self._template.render(
                **{**self._special_tokens, **_further(chat)},
                messages=messages,
                tools=tools or None,
                add_generation_prompt=True,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise invalid(
                "chat.messages", f"the model's chat template rejects them ({error})", "send roles in its order"
            ) from None


def _message(index: int, message: generate_pb2.ChatMessage) -> dict[str, Any]:
    """As templates expect it: what a message does not have is not defined."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = _tool_calls(index, message.tool_calls)
    return fields


def _tool_calls(index: int, calls: Sequence[generate_pb2.ToolCall]) -> list[dict[str, Any]]:
    """Templates write arguments out themselves, so they get them as an object."""
    shown = []
    for number, call in enumerate(calls):
        field = f"chat.messages[{index}].tool_calls[{number}].arguments"
        function = {"name": call.name, "arguments": _object(field, call.arguments or "{}")}
        shown.append({"type": "function", "id": call.id, "function": function})
    return shown


def _further(chat: generate_pb2.ChatInput) -> dict[str, Any]:
    if not chat.template_kwargs:
        return {}
    variables = _object("chat.template_kwargs", chat.template_kwargs)
    if taken := sorted(_OURS & variables.keys()):
        raise invalid("chat.template_kwargs", f"sets {', '.join(taken)}", "leave those out: the request has them")
    return variables


def _object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"is not JSON ({error})", "send a JSON object") from None
    if not isinstance(value, dict):
        raise invalid(field, f"is a {type(value).__name__}", "send a JSON object")
    return value


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Not Jinja's own: that one escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
