"""A model's chat template: conversations, with tools and what tools answered, to the text of a prompt.

It comes with a checkpoint, so it is rendered in a process that it may kill (``mesh.chat_template_worker``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import grpc
import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator

from expertmesh.mesh.chat_template_worker import LIMITS, new_environment
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.killable_worker import BusyError, KillableWorker, LostError, TooMuchError
from expertmesh.router.errors import Refusal, invalid
from expertmesh.v1 import generate_pb2

MAX_TEMPLATE_CHARS = 128 * 2**10
"""Some five times the longest in use; the process that renders them has the time to compile so much."""

MAX_PENDING = 1024
"""Many come at once, and each takes a fraction of a millisecond."""

_RETRY_AFTER_MS = 1000


class ChatTemplate:
    """Rendered in a sandbox, as transformers does, by a process that the first conversation starts. ``close`` it.

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
        try:
            takes_tools = _takes_tools(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(origin, f"the chat template is not valid ({error})", "mend it or remove it") from None
        setup = {"template": source, "takes_tools": takes_tools, "special_tokens": dict(special_tokens)}
        self.worker = KillableWorker(
            "expertmesh.mesh.chat_template_worker", setup, LIMITS, verb="render", max_pending=MAX_PENDING
        )

    async def render(self, chat: generate_pb2.ChatInput, max_bytes: int) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            Refusal: INVALID_ARGUMENT when a part of it is not JSON, the template has no place for tools or rejects the
                messages, or the prompt would be longer or take too much time or memory; RESOURCE_EXHAUSTED when too
                many others wait; UNAVAILABLE when no process can be started.
        """
        question = {
            "messages": [_message(message) for message in chat.messages],
            "tools": list(chat.tools),
            "template_kwargs": chat.template_kwargs,
            "max_bytes": max_bytes,
        }
        try:
            answer = await self.worker.ask(question)
        except TooMuchError as error:
            problem = f"with them the model's chat template {error}"
            raise invalid("chat.messages", problem, "send less, or have the operator set model.chat_template") from None
        except BusyError as error:
            raise _later(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{error} for the model's chat template") from None
        except LostError as error:
            raise _later(grpc.StatusCode.UNAVAILABLE, f"no process renders the chat template ({error})") from None
        if "text" not in answer:
            raise invalid(**answer)
        text: str = answer["text"]
        return text

    async def close(self) -> None:
        await self.worker.close()


class _Unfolded(CodeGenerator):
    """Computes nothing of what it compiles: for the checks that it makes, in the router's own process."""

    def _output_child_to_const(self, *_: Any) -> NoReturn:
        raise nodes.Impossible


def _takes_tools(source: str) -> bool:
    """Whether a template names them. Raises TemplateError, RecursionError where it is not valid."""
    environment = new_environment()
    environment.optimized = False
    environment.code_generator_class = _Unfolded
    parsed = environment.parse(source)
    environment.compile(parsed, raw=True)
    return any(name.name == "tools" and name.ctx == "load" for name in parsed.find_all(nodes.Name))


def _message(message: generate_pb2.ChatMessage) -> dict[str, Any]:
    """As templates expect it: what a message does not have is not defined."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = _tool_calls(message.tool_calls)
    return fields


def _tool_calls(calls: Sequence[generate_pb2.ToolCall]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def _later(code: grpc.StatusCode, problem: str) -> Refusal:
    return Refusal(code, f"chat: {problem}; try again later", retry_after_ms=_RETRY_AFTER_MS)
