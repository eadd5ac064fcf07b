"""Chunks of a stream: the quick way gives what the whole way gives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from expertmesh.router.detokenizer import Vocabulary
from expertmesh.router.http.answers import Answering, ChatShape, Choice, CompletionShape, Shape
from expertmesh.v1 import generate_pb2


def shape_of(shape_type: type[Shape], *, with_usage: bool = False, with_token_ids: bool = False) -> Shape:
    answering = Answering(
        id='"the text"-1',  # nothing that a client names takes the place of the text
        created=1,
        model='"the text"',
        fingerprint="fp",
        vocabulary=Vocabulary(Tokenizer(models.BPE())),
        with_logprobs=False,
        with_token_ids=with_token_ids,
        with_usage=with_usage,
        choices_per_prompt=1,
    )
    return shape_type(answering)


@pytest.mark.parametrize("shape_type", [CompletionShape, ChatShape])
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=3), index=st.integers(0, 2), with_usage=st.booleans())
def test_a_chunk_of_text_alone_is_as_any_other(
    shape_type: type[Shape], texts: list[str], index: int, with_usage: bool
) -> None:
    quick, whole = (
        shape_of(shape_type, with_usage=with_usage),
        shape_of(shape_type, with_usage=with_usage, with_token_ids=True),
    )
    choice, other = Choice(index), Choice(index)
    for text in texts:
        response = generate_pb2.GenerateResponse(text=text, token_ids=[1])
        chunk = json.loads(quick.chunk(choice, response).removeprefix(b"data: "))
        expected = json.loads(whole.chunk(other, response).removeprefix(b"data: "))
        assert expected["choices"][0].pop("token_ids") == [1]
        assert chunk == expected
    assert choice == other


def test_tokens_without_text_are_not_seen() -> None:
    response = generate_pb2.GenerateResponse(token_ids=[1])
    assert shape_of(CompletionShape).chunk(Choice(0), response) == b""
