"""What generations become in OpenAI's API: whole answers, and the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from expertmesh.router.detokenizer import Vocabulary
from expertmesh.v1 import generate_pb2

_FINISH_NAMES = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_CANCELLED: "abort",  # vLLM's word
}
_MARK = "the text"
Logprobs = Iterable[generate_pb2.TokenLogprob]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str
    fingerprint: str
    vocabulary: Vocabulary
    with_logprobs: bool
    with_token_ids: bool
    with_usage: bool
    """In the stream: a last chunk with it, and null in all others."""
    choices_per_prompt: int


@dataclass(slots=True)
class Choice:
    """One generation as it grows. What a stream has shown is not kept."""

    index: int
    num_chars: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[generate_pb2.TokenLogprob] = field(default_factory=list)
    finish: generate_pb2.Finish | None = None

    def keep(self, response: generate_pb2.GenerateResponse) -> None:
        self.text.append(response.text)
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        if response.HasField("finish"):
            self.finish = response.finish


class Shape:
    """Of one of the two APIs."""

    whole_object = ""
    chunk_object = ""
    id_prefix = ""

    def __init__(self, answering: Answering) -> None:
        self._a = answering
        self._chunk_head = self._head(self.chunk_object)
        self._plain: dict[int, tuple[str, str]] = {}  # by choice: what stands around the text of a chunk of text alone

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        return {
            **self._head(self.whole_object),
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": self._usage(choices),
        }

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """What comes before the first text of a choice, if anything does."""
        raise NotImplementedError

    def chunk(self, choice: Choice, response: generate_pb2.GenerateResponse) -> bytes:
        """The event of what a message adds; empty when a client would not see it."""
        a = self._a
        if response.text and not (a.with_logprobs or a.with_token_ids or response.HasField("finish")):
            choice.num_chars += len(response.text)
            return self._plain_event(choice.index, response.text)
        chunk = self._chunk(choice, response)
        return b"" if chunk is None else event(chunk)

    def _plain_event(self, index: int, text: str) -> bytes:
        """Of nearly all chunks: the first one, with another text."""
        if index not in self._plain:
            marked = event(self._chunk(Choice(index), generate_pb2.GenerateResponse(text=_MARK))).decode()
            head, _, tail = marked.rpartition(encode_basestring(_MARK))
            self._plain[index] = (head, tail)
        head, tail = self._plain[index]
        return f"{head}{encode_basestring(text)}{tail}".encode("utf-8", errors="replace")

    def _chunk(self, choice: Choice, response: generate_pb2.GenerateResponse) -> dict[str, Any] | None:
        a, finish = self._a, response.finish if response.HasField("finish") else None
        choice.finish = finish
        is_seen = response.text or finish is not None
        if not is_seen and not (response.token_ids and (a.with_logprobs or a.with_token_ids)):
            return None
        shown: dict[str, Any] = {
            "index": choice.index,
            **self._piece(response.text),
            "logprobs": self._logprobs(response.logprobs, choice.num_chars) if a.with_logprobs else None,
            "finish_reason": None if finish is None else _FINISH_NAMES[finish.reason],
        }
        if finish is not None:
            shown["stop_reason"] = _stop_reason(finish)
        if a.with_token_ids:
            shown["token_ids"] = list(response.token_ids)
        choice.num_chars += len(response.text)
        return self._envelope([shown])

    def last(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        """The chunk with the usage, where it was asked for."""
        return {**self._chunk_head, "choices": [], "usage": self._usage(choices)} if self._a.with_usage else None

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._chunk_head, "choices": choices}
        if self._a.with_usage:
            chunk["usage"] = None
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        a = self._a
        return {
            "id": a.id,
            "object": kind,
            "created": a.created,
            "model": a.model,
            "system_fingerprint": a.fingerprint,
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        assert choice.finish is not None, "a generation that was not refused ends with its finish"
        shown = {
            "index": choice.index,
            **self._message("".join(choice.text)),
            "logprobs": self._logprobs(choice.logprobs, 0) if self._a.with_logprobs else None,
            "finish_reason": _FINISH_NAMES[choice.finish.reason],
            "stop_reason": _stop_reason(choice.finish),
        }
        if self._a.with_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Of all choices; a prompt counts once, however many were asked for."""
        prompts = choices[:: self._a.choices_per_prompt]
        prompt_tokens = sum(choice.finish.prompt_tokens for choice in prompts if choice.finish is not None)
        completion_tokens = sum(choice.finish.completion_tokens for choice in choices if choice.finish is not None)
        cached_tokens = sum(choice.finish.cached_tokens for choice in prompts if choice.finish is not None)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def _message(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, logprobs: Logprobs, offset: int) -> dict[str, Any]:
        """``offset``: characters before them."""
        raise NotImplementedError

    def _token(self, token_id: int) -> str:
        return self._a.vocabulary.shown_bytes(token_id).decode("utf-8", errors="replace")


class CompletionShape(Shape):
    """``/v1/completions``."""

    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def first(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _piece = _message

    def _logprobs(self, logprobs: Logprobs, offset: int) -> dict[str, Any]:
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs:
            token = self._token(entry.token_id)
            shown["tokens"].append(token)
            shown["token_logprobs"].append(entry.logprob)
            shown["top_logprobs"].append({self._token(top.token_id): top.logprob for top in entry.top_logprobs})
            shown["text_offset"].append(offset)
            offset += len(token)
        return shown


class ChatShape(Shape):
    """``/v1/chat/completions``."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first(self, choice: Choice) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return self._envelope([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, logprobs: Logprobs, offset: int) -> dict[str, Any]:
        return {"content": [self._entry(entry) for entry in logprobs]}

    def _entry(self, entry: generate_pb2.TokenLogprob) -> dict[str, Any]:
        top = [self._alternative(top.token_id, top.logprob) for top in entry.top_logprobs]
        return {**self._alternative(entry.token_id, entry.logprob), "top_logprobs": top}

    def _alternative(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._a.vocabulary.shown_bytes(token_id)
        return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}


def event(data: object) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def to_json(data: object) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")


DONE = b"data: [DONE]\n\n"


def _stop_reason(finish: generate_pb2.Finish) -> int | str | None:
    """What ended the text: a stop string or a token's id."""
    match finish.WhichOneof("matched_stop"):
        case "matched_stop_str":
            return finish.matched_stop_str
        case "matched_token_id":
            return finish.matched_token_id
        case _:
            return None
