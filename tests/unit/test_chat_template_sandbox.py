"""A chat template comes with a checkpoint: Python is not in its reach, and too much ends its own request alone."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import grpc
import psutil
import pytest
import pytest_asyncio

from expertmesh.mesh.chat_template_worker import LIMITS
from expertmesh.mesh.errors import UserError
from expertmesh.router.chat_template import MAX_PENDING, MAX_TEMPLATE_CHARS, ChatTemplate
from expertmesh.router.errors import Refusal
from expertmesh.v1.generate_pb2 import ChatInput, ChatMessage

TIMEOUT_S = 30.0
MAX_BYTES = 4096
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['jinja2'] }}",
    "{{ strftime_now.__globals__['json'].dumps(1) }}",
    "{{ (''|attr('__class__')).__base__ }}",
    "{{ '{0.__class__.__base__}'.format('') }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{{ range(10000000)|length }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ raise_exception('x' * 10000000) }}",
]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BIG = "{{ ('x' * 1000000000)|length }}"
Open = Callable[[str], ChatTemplate]


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Open]:
    """Makes templates and closes them; no process of theirs stays."""
    before = set(psutil.Process().children())
    templates: list[ChatTemplate] = []

    def make(source: str) -> ChatTemplate:
        templates.append(ChatTemplate(source, {}, origin="test"))
        return templates[-1]

    yield make
    for template in templates:
        await asyncio.wait_for(template.close(), TIMEOUT_S)
    assert set(psutil.Process().children()) == before


async def render(template: ChatTemplate, content: str = "Hello", max_bytes: int = MAX_BYTES) -> str:
    chat = ChatInput(messages=[ChatMessage(role="user", content=content)])
    return await asyncio.wait_for(template.render(chat, max_bytes), TIMEOUT_S)


async def refusal_of(template: ChatTemplate, content: str = "Hello") -> Refusal:
    with pytest.raises(Refusal) as refused:
        await render(template, content)
    return refused.value


async def test_a_template_does_not_get_out(opened: Open) -> None:
    """One template with every way as a branch: one process has to stand them all."""
    branches = "".join(
        f"{{% if messages[0].content == '{number}' %}}{source}{{% endif %}}" for number, source in enumerate(ESCAPES)
    )
    template = opened(f"{branches}done")
    assert await render(template) == "done"
    pid = template.worker.pid
    for number, source in enumerate(ESCAPES):
        refusal = await refusal_of(template, str(number))
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.message.startswith("chat.messages: the model's chat template rejects them ("), source
        assert len(refusal.message) < 1000
    assert template.worker.pid == pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (LOOP, f"takes more than {LIMITS.cpu_s:g} s of CPU time to render"),
        (BIG, f"takes more than {LIMITS.memory_bytes >> 20} MiB of memory to render"),
        ("{{ '%1000000000d' % messages|length }}", "MiB of memory to render"),
        ("{% for a in range(99999) %}long enough{% endfor %}", f"makes a prompt of more than {MAX_BYTES} bytes"),
        ("{{ '{:>9999999}'.format('x') }}", f"makes a prompt of more than {MAX_BYTES} bytes"),
    ],
)
async def test_what_takes_too_much_ends_its_own_request_alone(opened: Open, source: str, problem: str) -> None:
    branch = f"{{% if messages[0].content == 'bad' %}}{source}{{% endif %}}{{{{ messages[0].content }}}}"
    template = opened(branch)
    bad = asyncio.create_task(refusal_of(template, "bad"))
    gone = asyncio.create_task(render(template, "gone"))
    await asyncio.sleep(0)
    gone.cancel()
    assert await render(template, "good") == "good"
    refusal = await bad
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.message.startswith("chat")
    assert problem in refusal.message
    assert "; send " in refusal.message
    with suppress(asyncio.CancelledError):
        await gone


@pytest.mark.slow
async def test_nothing_is_computed_in_the_process_of_the_router(opened: Open) -> None:
    """Jinja computes constants when it compiles."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    template = opened("{{ 9 ** 9 ** 9 }}{{ [1] * 10 ** 9 }}{{ 'x'|center(10 ** 9) }}")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 0.5
    assert after.ru_maxrss - before.ru_maxrss < 2**17, "KiB"
    assert template.worker.pid is None, "nobody has asked"
    assert " to render" in (await refusal_of(template)).message


async def test_the_death_of_the_process_is_survived(opened: Open) -> None:
    template = opened("{{ messages[0].content }}")
    assert await render(template, "one") == "one"
    pid = template.worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert await render(template, "two") == "two"
    assert template.worker.pid not in (pid, None)


async def test_what_waits_is_bounded_and_the_rest_is_served(opened: Open) -> None:
    template = opened("{{ messages[0].content }}")
    waiting = [asyncio.create_task(render(template, str(number))) for number in range(MAX_PENDING)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # wait_for starts a task of its own
    crowded = await refusal_of(template)
    assert crowded.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert crowded.retry_after_ms
    assert await asyncio.gather(*waiting) == [str(number) for number in range(MAX_PENDING)]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x" * (MAX_TEMPLATE_CHARS + 1), f"at most {MAX_TEMPLATE_CHARS}"),
        ("{{ x|no_such_filter }}", "No filter named"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid"),
    ],
)
def test_a_template_that_is_no_template_is_refused_at_the_start(source: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        ChatTemplate(source, {}, origin="test")


async def test_what_a_template_may_do(opened: Open) -> None:
    template = opened("{% for m in messages %}{{ m.role ~ ': ' ~ m['content']|trim|tojson }}{% endfor %}")
    assert await render(template) == 'user: "Hello"'
    text = "\n\x00<é漢😀>" * 50_000
    assert await render(opened("{{ messages[0].content }}"), text, 2**20) == text
