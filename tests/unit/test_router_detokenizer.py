"""Text from tokens: equal to the tokenizer's own decoding, whatever the tokens and their chunks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.router.detokenizer import Detokenizer, Vocabulary


@cache
def byte_level() -> Vocabulary:
    return Vocabulary(Tokenizer.from_file(str(demo_model_path() / "tokenizer.json")))


@cache
def byte_fallback() -> Vocabulary:
    """SentencePiece with byte fallback, as Mixtral's tokenizer.json decodes."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁▁", "é", "▁x▁y", "\ufffd"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Vocabulary(tokenizer)


def ids_of(text: str) -> list[int]:
    ids: list[int] = byte_level().tokenizer.encode(text).ids
    return ids


def run(detokenizer: Detokenizer, chunks: Sequence[Sequence[int]]) -> tuple[str, int, str | None]:
    """Text, tokens used, and the stop string that was found."""
    text, used = "", 0
    for chunk in chunks:
        piece = detokenizer.add(chunk)
        text += piece.text
        used += piece.num_tokens
        if piece.matched_stop is not None:
            return text, used, piece.matched_stop
    return text + detokenizer.flush(), used, None


def split(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[start:end] for start, end in pairwise(places)]


CUTS = st.lists(st.integers(0, 1000), max_size=8)


@given(ids=st.lists(st.integers(0, 8300), max_size=40), cuts=CUTS, skip=st.booleans())
@example(ids=[0, 1, 5], cuts=[1], skip=False)
def test_byte_level_text_equals_decode(ids: list[int], cuts: list[int], skip: bool) -> None:
    vocabulary = byte_level()
    text, used, _ = run(Detokenizer(vocabulary.token_text(skip_special_tokens=skip)), split(ids, cuts))
    assert text == vocabulary.tokenizer.decode(ids, skip_special_tokens=skip)
    assert used == len(ids)


@given(data=st.binary(max_size=24), cuts=CUTS)
@example(data="🙂é".encode()[:5], cuts=[1, 2, 3])
def test_any_bytes_as_byte_tokens_equal_decode(data: bytes, cuts: list[int]) -> None:
    vocabulary = byte_level()
    alphabet = {vocabulary.bytes_of(i): i for i in range(2, 258)}
    ids = [alphabet[bytes([byte])] for byte in data]
    text, _, _ = run(Detokenizer(vocabulary.token_text(skip_special_tokens=True)), split(ids, cuts))
    assert text == vocabulary.tokenizer.decode(ids)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 264), max_size=16), cuts=CUTS, skip=st.booleans())
@example(ids=[258, 258, 259], cuts=[], skip=True)
@example(ids=[1, 259, 197, 171, 260], cuts=[], skip=True)
@example(ids=[2, 1, 130], cuts=[], skip=True)
def test_byte_fallback_text_equals_decode(ids: list[int], cuts: list[int], skip: bool) -> None:
    vocabulary = byte_fallback()
    text, _, _ = run(Detokenizer(vocabulary.token_text(skip_special_tokens=skip)), split(ids, cuts))
    assert text == vocabulary.tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30))
def test_no_broken_character_is_shown_on_the_way(text: str) -> None:
    if "\ufffd" in text:
        return
    detokenizer = Detokenizer(byte_level().token_text(skip_special_tokens=True))
    assert all("\ufffd" not in detokenizer.add([token]).text for token in ids_of(text))


@given(
    text=st.text("ab \n", max_size=40),
    stop=st.lists(st.text("ab \n", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=CUTS,
    include=st.booleans(),
)
def test_stop_strings_end_the_text_where_they_are(text: str, stop: list[str], cuts: list[int], include: bool) -> None:
    ids = ids_of(text)

    def detokenizer() -> Detokenizer:
        return Detokenizer(byte_level().token_text(skip_special_tokens=True), stop=stop, include_stop=include)

    shown, used, matched = run(detokenizer(), split(ids, cuts))
    assert (shown, used, matched) == run(detokenizer(), [[token] for token in ids])
    if matched is None:
        assert shown == text
        assert not any(string in text for string in stop)
    else:
        decoded = byte_level().tokenizer.decode(ids[:used])
        assert matched in decoded
        assert not any(string in byte_level().tokenizer.decode(ids[: used - 1]) for string in stop)
        start = min(decoded.find(string) for string in stop if string in decoded)
        assert shown == decoded[: start + (len(matched) if include else 0)]


def test_stop_string_across_tokens_is_never_shown() -> None:
    ids = ids_of("one\n\nQuestion: two")
    detokenizer = Detokenizer(byte_level().token_text(skip_special_tokens=True), stop=["\n\nQuestion:"])
    text = ""
    for token in ids:
        piece = detokenizer.add([token])
        text += piece.text
        assert "\n" not in text
        if piece.matched_stop:
            break
    assert (text, piece.matched_stop) == ("one", "\n\nQuestion:")


def test_min_tokens_lets_an_early_stop_string_pass() -> None:
    ids = ids_of("a b a b a b")
    detokenizer = Detokenizer(byte_level().token_text(skip_special_tokens=True), stop=[" b"], min_tokens=4)
    text, used, matched = run(detokenizer, [ids])
    assert (text, used, matched) == ("a b a", 4, " b")


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(skip: bool) -> None:
    ids = [*ids_of("hi"), 0]
    text, _, _ = run(Detokenizer(byte_level().token_text(skip_special_tokens=skip)), [ids])
    assert text == ("hi" if skip else "hi<|endoftext|>")
