"""A request as the engine sees it, and the sequence that it becomes."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import numpy as np

from expertmesh.attention_server.tracing import RequestTrace
from expertmesh.v1 import attention_pb2

if TYPE_CHECKING:
    from expertmesh.attention_server.constraint import Matcher

Order = tuple[int, float, int]


class RefusedError(Exception):
    """A request that never runs; it ends with this status and message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop. ``logprobs`` None = not asked for; ``top_k`` 0 = off.

    ``end_ids`` are the stop ids and, unless end-of-sequence is ignored, the end-of-sequence ids. ``speculates``: drafts
    may be made for it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    end_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    speculates: bool = True

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class SequenceState(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A request in the engine. Everything below ``trace`` changes as it runs.

    ``tokens`` int64 holds ``num_tokens`` tokens (prompt, replayed and generated output) and has room for all to come.
    The last ``num_pending`` of them are being computed: their ids are not known yet. KV entries of the first
    ``num_computed`` tokens are in ``blocks``. ``deadline_s`` is monotonic, infinity = none.
    """

    link: int
    handle: int
    request_id: str
    tokens: np.ndarray
    num_prompt: int
    sampling: Sampling
    priority: int = 0
    tenant: str = ""
    arrival_s: float = 0.0
    deadline_s: float = float("inf")
    timeout_s: float = 0.0
    trace: RequestTrace | None = None
    matcher: Matcher | None = None  # of its constraint, after the output that is known

    num_tokens: int = 0
    num_pending: int = 0
    num_computed: int = 0
    state: SequenceState = SequenceState.WAITING
    serial: int = 0
    row: int = -1  # in the sequence table while it runs
    blocks: list[int] = field(default_factory=list)
    num_tabled: int = 0  # blocks already written to the sequence table
    digests: list[bytes] = field(default_factory=list)
    num_published: int = 0  # full blocks offered to the prefix cache
    cached_tokens: int = 0
    in_batch: bool = False  # of the prepared step
    dropped: bool = False  # ended while in the batch
    proposal: tuple[int, ...] = ()  # tokens that may follow, where it has ``proposal_at`` tokens
    proposal_at: int = 0
    was_admitted: bool = False
    queued_s: float = 0.0  # moments of the engine's clock; 0 = not yet
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def order(self) -> Order:
        """Who goes first of one tenant: the smaller priority number, then the earlier arrival."""
        return (self.priority, self.arrival_s, self.serial)

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_known_output(self) -> int:
        return self.num_tokens - self.num_pending - self.num_prompt

    @property
    def is_full(self) -> bool:
        """All its tokens are there, or on their way."""
        return self.num_tokens == len(self.tokens)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens still to prefill or generate."""
        return len(self.tokens) - self.num_computed

    def fill(self, token: int) -> None:
        """The first pending token is known now."""
        self.tokens[self.num_tokens - self.num_pending] = token
        self.num_pending -= 1

    def extend(self, num_accepted: int) -> None:
        """So many drafted tokens of the step that launched last were right: as many more tokens are pending."""
        self.num_tokens += num_accepted
        self.num_pending += num_accepted
        self.num_computed += num_accepted


def parse_submit(
    submit: attention_pb2.Submit,
    *,
    link: int,
    now_s: float,
    vocab_size: int,
    max_model_len: int,
) -> Sequence:
    """Turn a router's message into a sequence.

    Raises:
        RefusedError: INVALID_ARGUMENT when this model cannot run the tokens. Routers check before they submit; this
            keeps a router of another version from breaking the step loop.
    """
    num_prompt = len(submit.prompt_token_ids)
    given = np.array([*submit.prompt_token_ids, *submit.output_token_ids], dtype=np.int64)
    params = submit.sampling_params
    room = min(num_prompt + params.max_tokens, max_model_len)
    if not num_prompt:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "prompt_token_ids is empty: send at least one token")
    if int(given.max()) >= vocab_size:
        raise RefusedError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"token id {int(given.max())} is outside the vocabulary: ids go from 0 to {vocab_size - 1}",
        )
    if len(given) >= room:
        raise RefusedError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{num_prompt} prompt and {len(given) - num_prompt} output tokens leave none to generate: max_tokens is "
            f"{params.max_tokens}, max_model_len {max_model_len}",
        )
    tokens = np.zeros(room, dtype=np.int64)
    tokens[: len(given)] = given
    return Sequence(
        link=link,
        handle=submit.handle,
        request_id=submit.request_id,
        tokens=tokens,
        num_prompt=num_prompt,
        num_tokens=len(given),
        sampling=_sampling(submit),
        priority=submit.priority,
        tenant=submit.tenant,
        arrival_s=submit.arrival_unix_s,
        deadline_s=now_s + submit.timeout_s if submit.timeout_s > 0 else float("inf"),
        timeout_s=submit.timeout_s,
        queued_s=now_s,
    )


def _sampling(submit: attention_pb2.Submit) -> Sampling:
    params = submit.sampling_params
    # A constrained output ends where it must, which is what end-of-sequence is allowed for then.
    ends = not params.ignore_eos or params.WhichOneof("constraint") is not None
    eos_ids = submit.eos_token_ids if ends else ()
    return Sampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        min_tokens=params.min_tokens,
        end_ids=frozenset((*params.stop_token_ids, *eos_ids)),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        seed=params.seed,
        logit_bias=dict(params.logit_bias),
        speculates=not params.disable_speculation,
    )
