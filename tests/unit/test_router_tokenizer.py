"""Prompts to token ids: plain, chat, too long; and folders that hold no usable tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import grpc
import pytest

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.router.errors import Refusal
from expertmesh.router.tokenizer import INLINE_CHARS, load_tokenizer
from expertmesh.router.validation import ModelLimits, SamplingDefaults
from expertmesh.v1.generate_pb2 import ChatInput, ChatMessage, ToolCall

LIMITS = ModelLimits(name="demo", vocab_size=8192, max_model_len=1024, defaults=SamplingDefaults())
MAX_BYTES = 4096
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- bos_token + message.role + ': ' + message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
"""
HELLO = ChatInput(messages=[ChatMessage(role="user", content="Hello <b>")])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, tmp_path)
    return tmp_path


async def test_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    short, long = "Once upon a time", "Once upon a time " * (INLINE_CHARS // 16)
    assert await tokenizer.text_ids(short, LIMITS) == tokenizer.tokenizer.encode(short).ids
    assert len(long) > INLINE_CHARS
    assert await tokenizer.text_ids(long, LIMITS) == tokenizer.tokenizer.encode(long).ids
    await tokenizer.close()


@pytest.mark.parametrize("words", [1100, 1_000_000])
async def test_text_that_is_too_long(folder: Path, words: int) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Refusal, match="tokens and max_model_len is 1024") as refused:
        await tokenizer.text_ids("one " * words, LIMITS)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert ("at least" in refused.value.message) == (words == 1_000_000)
    await tokenizer.close()


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named"])
async def test_chat(folder: Path, place: str) -> None:
    if place == "chat_template.jinja":
        (folder / place).write_text(TEMPLATE, encoding="utf-8")
    else:
        path = folder / "tokenizer_config.json"
        template = TEMPLATE if place != "named" else [{"name": "default", "template": TEMPLATE}]
        settings = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
        path.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    ids = await tokenizer.chat_ids(HELLO, LIMITS, MAX_BYTES)
    text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|endoftext|>user: Hello <b>\nassistant:"
    with pytest.raises(Refusal, match="no role system") as refused:
        await tokenizer.chat_ids(ChatInput(messages=[ChatMessage(role="system", content="x")]), LIMITS, MAX_BYTES)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(Refusal, match=r"chat\.messages: is empty"):
        await tokenizer.chat_ids(ChatInput(), LIMITS, MAX_BYTES)
    await tokenizer.close()


async def test_chat_with_what_the_template_has_no_place_for(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    call = ToolCall(id="1", name="f", arguments="[]")
    for chat, problem in (
        (ChatInput(messages=HELLO.messages, tools=["{}"]), r"chat\.tools: .*no place for tools"),
        (ChatInput(messages=HELLO.messages, tools=["{"]), r"chat\.tools\[0\]: is not JSON"),
        (ChatInput(messages=HELLO.messages, template_kwargs='{"tools": 1}'), r"chat\.template_kwargs: sets tools"),
        (
            ChatInput(messages=[ChatMessage(role="assistant", tool_calls=[call])]),
            r"chat\.messages\[0\]\.tool_calls\[0\]\.arguments: is a list",
        ),
    ):
        with pytest.raises(Refusal, match=problem) as refused:
            await tokenizer.chat_ids(chat, LIMITS, MAX_BYTES)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    await tokenizer.close()


async def test_chat_without_a_template_names_the_remedy(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Refusal, match=r"chat_template\.jinja") as refused:
        await tokenizer.chat_ids(HELLO, LIMITS, MAX_BYTES)
    await tokenizer.close()
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_template_cannot_reach_python(folder: Path) -> None:
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Refusal, match="rejects them"):
        await tokenizer.chat_ids(HELLO, LIMITS, MAX_BYTES)
    await tokenizer.close()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", None, "does not exist"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "does not hold an object"),
        ("chat_template.jinja", "{% for", "not valid"),
    ],
)
def test_unusable_folders(folder: Path, file: str, content: str | None, problem: str) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=problem) as wrong:
        load_tokenizer(folder)
    assert file in wrong.value.key
