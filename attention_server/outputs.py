"""What an engine tells of its sequences: what each step did for them, and its load."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from expertmesh.attention_server.request import Sequence
from expertmesh.attention_server.sampler import Logprobs
from expertmesh.v1 import generate_pb2


@dataclass(frozen=True, slots=True)
class Output:
    """What a step did for a sequence. ``token`` None = nothing new; ``code`` other than OK ends it with ``message``.

    ``cached_tokens``: said with the first token and the last one.
    """

    link: int
    handle: int
    token: int | None = None
    logprobs: Logprobs | None = None
    finish: generate_pb2.FinishReason.ValueType = generate_pb2.FINISH_REASON_UNSPECIFIED
    matched_id: int | None = None
    cached_tokens: int = 0
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""

    @property
    def ends(self) -> bool:
        return bool(self.finish) or self.code is not grpc.StatusCode.OK


@dataclass(frozen=True, kw_only=True)
class Load:
    """A server's state at one moment; ``kv_cache_usage`` 0 .. 1."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_kv_blocks: int
    outstanding_tokens: int
    serving: bool


def answer(sequence: Sequence, token: int, logprobs: Logprobs | None, *, is_first: bool) -> Output:
    """``token`` is the sequence's first pending one: it is filled in, and ends the sequence where it has to."""
    sequence.fill(token)
    finish, matched_id = generate_pb2.FINISH_REASON_UNSPECIFIED, None
    ends = token in sequence.sampling.end_ids and sequence.num_known_output >= sequence.sampling.min_tokens
    matcher = sequence.matcher
    if matcher is not None and not ends:
        matcher.accept(token)
    if matcher is not None and matcher.problem:
        return ended(sequence, grpc.StatusCode.INVALID_ARGUMENT, matcher.problem)
    if ends:
        finish, matched_id = generate_pb2.FINISH_REASON_STOP, token
    elif matcher is not None and matcher.must_end:
        finish = generate_pb2.FINISH_REASON_STOP
    elif sequence.num_tokens == len(sequence.tokens) and not sequence.num_pending:
        finish = generate_pb2.FINISH_REASON_LENGTH
    cached_tokens = sequence.cached_tokens if is_first or finish else 0
    return Output(sequence.link, sequence.handle, token, logprobs, finish, matched_id, cached_tokens)


def ended(sequence: Sequence, code: grpc.StatusCode, message: str) -> Output:
    """It ends with this status, whatever was sampled for it."""
    return Output(sequence.link, sequence.handle, cached_tokens=sequence.cached_tokens, code=code, message=message)
