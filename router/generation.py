"""One request while it runs: tokens come in from a link, text goes out to the client, at whatever pace it reads.

Everything that arrived and was not taken yet coalesces into one message, so a slow client costs at most the memory of
its own output.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc

from expertmesh.router.detokenizer import Detokenizer
from expertmesh.router.errors import Refusal
from expertmesh.v1 import attention_pb2, generate_pb2

STOP = generate_pb2.FINISH_REASON_STOP
LENGTH = generate_pb2.FINISH_REASON_LENGTH
UNSPECIFIED = generate_pb2.FINISH_REASON_UNSPECIFIED


class Generation:
    """The state of one request. Everything runs on the event loop's thread.

    A link calls ``on_token``, ``on_delta`` and ``on_lost``; the request's handler waits with ``changed``, reads
    ``take``, ``finish`` and ``refusal``, and finds a new attention server when ``needs_server`` is true.

    Args:
        request_id: as the client knows it.
        prompt_token_ids: not empty.
        sampling: resolved.
        max_replays: attention servers that may be lost under the request.
        clock: seconds, monotonic.
        accepted_s: when the request arrived, on ``clock``.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: generate_pb2.SamplingParams,
        detokenizer: Detokenizer,
        max_replays: int,
        clock: Callable[[], float],
        accepted_s: float,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.output_token_ids: list[int] = []
        self.needs_server = True
        self.replays = 0
        self.kv_source: attention_pb2.KvSource | None = None
        """Who has the KV blocks of the prompt, where that is another server than the one that goes on."""
        self.was_prefilling = False
        self._prefilled_at: attention_pb2.KvSource | None = None
        self.refused_by: dict[str, str] = {}  # attention servers that took nothing new, and why
        self.finish: generate_pb2.Finish | None = None
        self.refusal: Refusal | None = None
        self.first_token_s: float | None = None
        self.on_first_token: Callable[[float], None] | None = None
        """Is told when it came, on ``clock``. It must not keep the generation, which would then outlive its end."""
        self.on_gap: Callable[[float, int], None] | None = None
        """Is told the mean time between so many tokens, of every step but the first."""
        self.last_token_s = accepted_s
        self._detokenizer = detokenizer
        self._max_replays = max_replays
        self._clock = clock
        self.accepted_s = accepted_s
        self._cached_tokens = 0
        self._token_ids: list[int] = []  # not taken yet, as the next two
        self._logprobs: list[generate_pb2.TokenLogprob] = []
        self._texts: list[str] = []
        self._finish_taken = False
        self._has_changed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.refusal is not None

    @property
    def is_prefilling(self) -> bool:
        """Whether its server computes the prompt and the first token only."""
        return self._prefilled_at is not None

    def placed(self, prefill: attention_pb2.KvSource | None = None) -> None:
        """A server has it. With ``prefill`` it ends after the first token; another server goes on, with the KV blocks
        to be had there."""
        self.needs_server = False
        self._prefilled_at = prefill
        self.was_prefilling |= prefill is not None

    def on_token(self, token_id: int, now_s: float) -> bool:
        """As ``on_delta``, for a token of which there is nothing else to say; ``now_s`` is the clock's."""
        if self.finish is not None or self.refusal is not None:
            return False
        self._note_tokens(1, now_s)
        text, matched_stop = self._detokenizer.add_token(token_id)
        self._texts.append(text)
        self._token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        if matched_stop is not None:
            self._end(generate_pb2.Finish(reason=STOP, matched_stop_str=matched_stop))
            return False
        self.wake()
        return True

    def on_delta(self, delta: attention_pb2.TokenDelta, server_id: str, now_s: float) -> bool:
        """Take what a step produced; whether the attention server should go on with the sequence."""
        if self.ended:
            return False
        if delta.status_code:
            self._on_status(delta, server_id)
            return False
        self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        matched_stop = self._add_tokens(delta, now_s)
        if matched_stop is not None:
            self._end(generate_pb2.Finish(reason=STOP, matched_stop_str=matched_stop))
        elif self.is_prefilling and delta.finish_reason == LENGTH:
            self.kv_source, self._prefilled_at = self._prefilled_at, None
            self.needs_server = True
        elif delta.finish_reason != UNSPECIFIED:
            self._texts.append(self._detokenizer.flush())
            finish = generate_pb2.Finish(reason=delta.finish_reason)
            if delta.HasField("matched_token_id"):
                finish.matched_token_id = delta.matched_token_id
            self._end(finish)
        self.wake()
        return not self.ended

    def on_lost(self, reason: str) -> None:
        """The link broke under the request: it goes on elsewhere with what it has, as often as it may."""
        self._prefilled_at = None
        if self.ended:
            return
        self.replays += 1
        if self.replays > self._max_replays:
            allowed = (
                "and the request may not be replayed (disable_replay, or router.replay_attempts 0)"
                if self._max_replays == 0
                else f"the {self.replays}th under this request (router.replay_attempts {self._max_replays})"
            )
            self.fail(Refusal(grpc.StatusCode.UNAVAILABLE, f"an attention server was lost, {allowed}: {reason}"))
            return
        self.needs_server = True
        self.wake()

    def cancel(self) -> None:
        """End with FINISH_REASON_CANCELLED and what there is."""
        if self.ended:
            return
        self._texts.append(self._detokenizer.flush())
        self._end(generate_pb2.Finish(reason=generate_pb2.FINISH_REASON_CANCELLED))

    def fail(self, refusal: Refusal) -> None:
        if not self.ended:
            self.refusal = refusal
            self.wake()

    def wake(self) -> None:
        self._has_changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changed(self) -> None:
        """Until something has changed since the call before. It waits as long as it takes: ``Patience`` ends it."""
        if not self._has_changed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._has_changed = False

    def take(self) -> generate_pb2.GenerateResponse | None:
        """Everything that came since the last call; ``None`` when that is nothing a client would see."""
        text = "".join(self._texts)
        finish = None if self._finish_taken else self.finish
        if not (text or self._token_ids or finish):
            return None
        response = generate_pb2.GenerateResponse(request_id=self.request_id, text=text, token_ids=self._token_ids)
        if self._logprobs:
            response.logprobs.extend(self._logprobs)
            self._logprobs.clear()
        if finish is not None:
            response.finish.CopyFrom(finish)
            self._finish_taken = True
        self._texts.clear()
        self._token_ids.clear()
        return response

    def _note_tokens(self, count: int, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s = now_s
            if self.on_first_token is not None:
                self.on_first_token(now_s)
            count -= 1
        if count and self.on_gap is not None:
            self.on_gap((now_s - self.last_token_s) / count, count)
        self.last_token_s = now_s

    def _add_tokens(self, delta: attention_pb2.TokenDelta, now_s: float) -> str | None:
        """Text and ids of the delta; returns the stop string that they complete."""
        token_ids = list(delta.token_ids)
        shown_ids = token_ids
        if self._ends_with_hidden_stop(delta):
            shown_ids = token_ids[:-1]
        piece = self._detokenizer.add(shown_ids)
        if piece.matched_stop is not None:
            token_ids = token_ids[: piece.num_tokens]
        if token_ids:
            self._note_tokens(len(token_ids), now_s)
        self._texts.append(piece.text)
        self.output_token_ids += token_ids
        self._token_ids += token_ids
        self._logprobs += delta.logprobs[: len(token_ids)]
        return piece.matched_stop

    def _ends_with_hidden_stop(self, delta: attention_pb2.TokenDelta) -> bool:
        """The token that ended the sequence is no part of the text unless asked for, as in vLLM."""
        return (
            delta.finish_reason == STOP
            and delta.HasField("matched_token_id")
            and bool(delta.token_ids)
            and delta.token_ids[-1] == delta.matched_token_id
            and not self.sampling.include_stop_str_in_output
        )

    def _on_status(self, delta: attention_pb2.TokenDelta, server_id: str) -> None:
        code = _STATUS_OF.get(delta.status_code, grpc.StatusCode.INTERNAL)
        if self.is_prefilling and code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # there are others to compute the prompt
            self._prefilled_at = None
            self.needs_server = True
            self.wake()
            return
        if code is grpc.StatusCode.UNAVAILABLE:  # it stops: another one may go on
            self.refused_by[server_id] = delta.error_message
            if self.output_token_ids:
                self.on_lost(f"attention server {server_id}: {delta.error_message}")
                return
            self.needs_server = True
            self.wake()
            return
        self.fail(Refusal(code, delta.error_message))

    def _end(self, finish: generate_pb2.Finish) -> None:
        now_s = self._clock()
        finish.prompt_tokens = len(self.prompt_token_ids)
        finish.completion_tokens = len(self.output_token_ids)
        finish.cached_tokens = self._cached_tokens
        finish.ttft_ms = 1000 * ((self.first_token_s or now_s) - self.accepted_s)
        finish.e2e_ms = 1000 * (now_s - self.accepted_s)
        finish.replays = self.replays
        self.finish = finish
        self.wake()


_STATUS_OF = {code.value[0]: code for code in grpc.StatusCode}
