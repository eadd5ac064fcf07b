"""A chat template comes with a checkpoint: it may compute a prompt, and nothing of Python is in its reach."""

from __future__ import annotations

import pytest

from expertmesh.mesh.errors import UserError
from expertmesh.router.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from expertmesh.router.errors import Refusal
from expertmesh.v1.generate_pb2 import ChatInput, ChatMessage

CHAT = ChatInput(messages=[ChatMessage(role="user", content="Hello")])


def render(source: str) -> str:
    return ChatTemplate(source, {}, origin="test").render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
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
    ],
)
def test_a_template_does_not_get_out(source: str) -> None:
    with pytest.raises(Refusal, match="chat template rejects them"):
        render(source)


def test_a_template_that_is_too_long_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=f"at most {MAX_TEMPLATE_CHARS}"):
        render("x" * (MAX_TEMPLATE_CHARS + 1))


def test_what_a_template_may_do() -> None:
    assert (
        render("{% for m in messages %}{{ m.role ~ ': ' ~ m['content']|trim|tojson }}{% endfor %}") == 'user: "Hello"'
    )
