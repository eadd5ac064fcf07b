"""Prompts to token ids: the checkpoint's ``tokenizer.json`` and chat template.

Short prompts are tokenised on the event loop; long ones on a thread, so that other streams go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from expertmesh.mesh.errors import UserError
from expertmesh.router.chat_template import ChatTemplate
from expertmesh.router.errors import Refusal, invalid
from expertmesh.router.validation import ModelLimits, check_prompt_length
from expertmesh.v1 import generate_pb2

INLINE_CHARS = 2048  # about half a millisecond of tokenising
_NUM_THREADS = 2
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class PromptTokenizer:
    """What a prompt becomes. ``close`` ends its threads and the process of its chat template."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._longest_token_bytes = _longest_token_bytes(tokenizer)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenise")

    async def text_ids(self, text: str, limits: ModelLimits) -> Sequence[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts around one.

        Raises:
            Refusal: INVALID_ARGUMENT, longer than ``limits.max_model_len`` allows.
        """
        return await self._encode("text", text, limits, special_tokens=True)

    async def chat_ids(self, chat: generate_pb2.ChatInput, limits: ModelLimits, max_bytes: int) -> Sequence[int]:
        """Token ids of a conversation, whose text has at most ``max_bytes``.

        Raises:
            Refusal: FAILED_PRECONDITION without a chat template; INVALID_ARGUMENT without messages, when the template
                rejects them or their tools, or when they are too long; and those of ``ChatTemplate.render``.
        """
        if self.chat_template is None:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"chat: the model {limits.name!r} has no chat template: send a plain text,"
                " add chat_template.jinja to the checkpoint folder, or set model.chat_template",
                field="chat",
            )
        if not chat.messages:
            raise invalid("chat.messages", "is empty", "send at least one message")
        text = await self.chat_template.render(chat, max_bytes)
        return await self._encode("chat", text, limits, special_tokens=False)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.chat_template is not None:
            await self.chat_template.close()

    async def _encode(self, field: str, text: str, limits: ModelLimits, *, special_tokens: bool) -> Sequence[int]:
        if len(text) <= INLINE_CHARS:
            return self._encode_now(field, text, limits, special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_now, field, text, limits, special_tokens)

    def _encode_now(self, field: str, text: str, limits: ModelLimits, special_tokens: bool) -> Sequence[int]:
        if self._longest_token_bytes:  # megabytes that cannot fit are refused without tokenising them
            fewest = -(-len(text.encode()) // self._longest_token_bytes)
            check_prompt_length(field, fewest, limits, at_least="at least ")
        encoding = self.tokenizer.encode(text, add_special_tokens=special_tokens)
        check_prompt_length(field, len(encoding), limits)
        ids: list[int] = encoding.ids
        return ids


def load_tokenizer(folder: Path, chat_template: Path | None = None) -> PromptTokenizer:
    """Read ``tokenizer.json``, and the chat template from ``chat_template.jinja`` or ``tokenizer_config.json``.

    Args:
        chat_template: a file to read instead of the folder's own.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(str(path), "does not exist", "give a checkpoint folder with its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
        raise UserError(str(path), f"cannot be read ({error})", "download the file again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return PromptTokenizer(tokenizer, _load_chat_template(folder, chat_template))


def _load_chat_template(folder: Path, instead: Path | None) -> ChatTemplate | None:
    settings = _read_settings(folder / "tokenizer_config.json")
    special_tokens = {}
    for name in _SPECIAL_TOKENS:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            special_tokens[name] = content
    file = instead or folder / "chat_template.jinja"
    if instead is not None or file.is_file():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, origin=str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(str(file), f"cannot be read ({error})", "mend the file or remove it") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if template is None:
        return None
    return ChatTemplate(str(template), special_tokens, origin=str(folder / "tokenizer_config.json"))


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "mend the file or remove it") from None
    if not isinstance(settings, dict):
        raise UserError(str(path), "does not hold an object", "mend the file or remove it")
    return settings


def _longest_token_bytes(tokenizer: Tokenizer) -> int:
    """A bound on how much text one token can stand for; 0 where there is none (text is normalised or trimmed)."""
    added = tokenizer.get_added_tokens_decoder().values()
    if not isinstance(tokenizer.decoder, ByteLevel) or tokenizer.normalizer is not None:
        return 0
    if any(token.lstrip or token.rstrip for token in added):
        return 0
    # A byte-level token has one character a byte; an added one stands as it is.
    return max(len(token.encode()) for token in tokenizer.get_vocab(with_added_tokens=True))
