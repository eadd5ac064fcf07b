"""A request from the door to its end: checked, admitted, placed on an attention server, replayed when it is lost."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc

from expertmesh.mesh.config import RouterConfig
from expertmesh.mesh.constraint import constraint_of
from expertmesh.mesh.gate import ANYBODY, Principal
from expertmesh.router import validation
from expertmesh.router.admission import Admission
from expertmesh.router.constraint_check import ConstraintChecker
from expertmesh.router.detokenizer import Detokenizer
from expertmesh.router.errors import Refusal, invalid
from expertmesh.router.generation import Generation
from expertmesh.router.links import AttentionLink
from expertmesh.router.model import RouterModel
from expertmesh.router.patience import Patience
from expertmesh.router.pool import LinkPool
from expertmesh.router.prefill import PrefillMesh
from expertmesh.router.spans import RequestTelemetry
from expertmesh.v1 import attention_pb2, generate_pb2

log = logging.getLogger(__name__)

Emit = Callable[[generate_pb2.GenerateResponse], Awaitable[None]]

_REFUSED_PAUSE_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """What the RPC says beside its message. ``deadline_s``: on ``time.monotonic``; ``None`` = none.

    ``principal``: who calls; their tenant goes before the request's own, and they pay for its tokens.
    """

    deadline_s: float | None
    telemetry: RequestTelemetry
    principal: Principal = ANYBODY


class Runner:
    """Runs requests. One a router; all of it on the event loop's thread."""

    def __init__(
        self, config: RouterConfig, model: RouterModel, pool: LinkPool, prefill: PrefillMesh | None = None
    ) -> None:
        self.admission = Admission(
            max_requests=config.max_queued_requests,
            max_requests_per_tenant=config.max_requests_per_tenant,
            clock=time.monotonic,
            backlog=lambda: pool.num_waiting,
        )
        self.constraints = ConstraintChecker(
            model.spec.path / "tokenizer.json", model.spec.vocab_size, model.spec.eos_token_ids
        )
        self._config = config
        self._model = model
        self._pool = pool
        self._prefill = prefill
        self._running: dict[str, Generation] = {}
        self._cancelled_early: set[str] = set()  # cancelled while their prompt was tokenised
        self._owners: dict[str, str] = {}  # the principal's tenant, of each request that is held

    def cancel(self, request_id: str, principal: Principal = ANYBODY) -> bool:
        """End a running request with what it has; whether there was one. Others' requests are as if there were none."""
        if not self.admission.holds(request_id) or self._owners.get(request_id) != principal.tenant:
            return False
        if request_id in self._running:
            self._running[request_id].cancel()
        else:
            self._cancelled_early.add(request_id)
        return True

    async def run(self, request: generate_pb2.GenerateRequest, caller: Caller, emit: Emit) -> None:
        """Generate; ``emit`` gets every message, the last one with ``finish``.

        Raises:
            Refusal: the status that the request ends with.
            CancelledError: the client went away; nothing of the request remains.
        """
        accepted_s = time.monotonic()
        request_id = request.request_id or f"gen-{uuid.uuid4().hex}"
        self._check_envelope(request)
        timeout_s = None if caller.deadline_s is None else caller.deadline_s - accepted_s
        tenant = caller.principal.tenant or request.tenant
        self.admission.admit(request_id, tenant, request.priority, timeout_s)
        self._owners[request_id] = caller.principal.tenant
        caller.telemetry.on_admitted(request_id)
        try:
            generation = await self._accept(request, request_id, accepted_s, caller.telemetry)
            caller.principal.charge(len(generation.prompt_token_ids))
            caller.telemetry.on_accepted(generation)
            self._running[request_id] = generation
            if request_id in self._cancelled_early:
                generation.cancel()
            self.admission.may_shed(request_id, generation.fail)
            generation.on_first_token = functools.partial(self._begun, request_id, caller.telemetry)
            generation.on_gap = caller.telemetry.on_gap
            await _Placement(self, generation, request, caller).drive(emit)
        finally:
            self._running.pop(request_id, None)
            self._owners.pop(request_id, None)
            self._cancelled_early.discard(request_id)
            self.admission.release(request_id)

    def _begun(self, request_id: str, telemetry: RequestTelemetry, now_s: float) -> None:
        """Its first token is there."""
        self.admission.may_shed(request_id, None)
        telemetry.on_first_token(now_s)

    def _check_envelope(self, request: generate_pb2.GenerateRequest) -> None:
        """What costs nothing to check, before the request takes a place."""
        validation.check_name("request_id", request.request_id)
        validation.check_name("tenant", request.tenant)
        validation.check_model(request.model, self._model.limits)
        validation.check_priority(request.priority)
        field = request.WhichOneof("input")
        if field is None:
            raise invalid("input", "there is no prompt", "set one of text, tokenized, chat")
        num_bytes = len(request.text.encode()) if field == "text" else getattr(request, field).ByteSize()
        validation.check_prompt_bytes(field, num_bytes, self._config.max_prompt_bytes)

    async def _accept(
        self,
        request: generate_pb2.GenerateRequest,
        request_id: str,
        accepted_s: float,
        telemetry: RequestTelemetry,
    ) -> Generation:
        limits = self._model.limits
        prompt_token_ids = await self._prompt_ids(request)
        telemetry.on_tokenised(len(prompt_token_ids))
        sampling = validation.resolve_sampling(
            request.sampling_params,
            limits,
            num_prompt_tokens=len(prompt_token_ids),
            choose_seed=lambda: secrets.randbits(63),
        )
        constraint = constraint_of(sampling)
        if constraint is not None:
            await self.constraints.check(constraint)
            telemetry.on_constraint_checked(constraint.kind)
        return Generation(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            detokenizer=Detokenizer(
                self._model.vocabulary.token_text(skip_special_tokens=sampling.skip_special_tokens),
                stop=sampling.stop,
                include_stop=sampling.include_stop_str_in_output,
                min_tokens=sampling.min_tokens,
            ),
            max_replays=0 if request.disable_replay else self._config.replay_attempts,
            clock=time.monotonic,
            accepted_s=accepted_s,
        )

    async def _prompt_ids(self, request: generate_pb2.GenerateRequest) -> Sequence[int]:
        limits, tokenizer = self._model.limits, self._model.tokenizer
        match request.WhichOneof("input"):
            case "text":
                token_ids, field = await tokenizer.text_ids(request.text, limits), "text"
            case "chat":
                token_ids, field = await tokenizer.chat_ids(request.chat, limits, self._config.max_prompt_bytes), "chat"
            case _:
                field = "tokenized.input_ids"
                validation.check_prompt_length(field, len(request.tokenized.input_ids), limits)
                token_ids = list(request.tokenized.input_ids)
        validation.check_prompt_ids(field, token_ids, limits)
        return token_ids


class _Placement:
    """One request on its way through attention servers."""

    def __init__(
        self, runner: Runner, generation: Generation, request: generate_pb2.GenerateRequest, caller: Caller
    ) -> None:
        self._pool = runner._pool
        self._prefill = runner._prefill
        self._config = runner._config
        self._eos_token_ids = runner._model.spec.eos_token_ids
        self._generation = generation
        self._priority = request.priority
        self._tenant = caller.principal.tenant or request.tenant
        self._caller = caller
        self._link: AttentionLink | None = None
        self._handle = 0
        self._began_under = self._pool.view_traceparent

    async def drive(self, emit: Emit) -> None:
        """Until the request ends; then, or when cancelled, the attention server lets go of it."""
        generation = self._generation
        stalled = asyncio.timeout(None)  # its end is the patience's to set
        patience = Patience(generation, self._config, self._caller.deadline_s, stalled, self._why_not_serving)
        # A task of its own: what wakes up for every token does not go through all the calls that led here.
        passing_on = asyncio.create_task(self._pass_on(emit, patience), name=f"pass on {generation.request_id}")
        try:
            async with stalled:
                await passing_on
        except TimeoutError:
            if not stalled.expired():
                raise
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the client read nothing for {self._config.client_stall_timeout_s:g} s"
                " (router.client_stall_timeout_s); read the stream as it comes",
            ) from None
        finally:
            patience.end()
            del stalled
            self._pool.forget(generation)
            if self._pool.view_traceparent != self._began_under:
                self._caller.telemetry.on_view_changed(self._pool.view_traceparent)
            if self._link is not None:
                self._link.abort(self._handle)
        if generation.refusal is not None:
            raise generation.refusal.anew()

    async def _pass_on(self, emit: Emit, patience: Patience) -> None:
        """What comes, to the client; while that takes a message, what comes next gathers for the one behind it."""
        generation, principal = self._generation, self._caller.principal
        while True:
            if generation.needs_server and not generation.ended:
                await self._place(patience)
            response = generation.take()
            if response is None:
                if generation.ended:
                    return
                await generation.changed()
                if generation.needs_server:
                    patience.look()
                continue
            if response.HasField("finish"):
                self._caller.telemetry.on_finish(generation, response.finish)
            principal.charge(len(response.token_ids))
            patience.emitting_since_s = time.monotonic()
            await emit(response)
            patience.emitting_since_s = None

    async def _place(self, patience: Patience) -> None:
        """Submit to the best server there is; without one, be woken when that may have changed."""
        generation = self._generation
        if self._link is not None:
            self._caller.telemetry.on_homeless(self._link.server_id)
            self._link = None
        self._caller.telemetry.on_choosing()
        prefill = self._prefill.choose(generation) if self._prefill is not None else None
        link = prefill or self._pool.choose(generation.prompt_token_ids, avoid=generation.refused_by)
        if link is None:
            self._pool.notify(generation)
            patience.look()
            return
        if link.server_id in generation.refused_by:  # there is no other: ask again, but not in a tight loop
            await asyncio.sleep(_REFUSED_PAUSE_S)
        generation.placed(prefill.kv_source if prefill is not None else None)
        self._link = patience.link = link
        self._handle = link.submit(generation, self._submit_message())
        patience.look()
        self._caller.telemetry.on_placed(generation, link.server_id, self._pool.num_serving)

    def _submit_message(self) -> attention_pb2.Submit:
        generation = self._generation
        submit = attention_pb2.Submit(
            request_id=generation.request_id,
            prompt_token_ids=generation.prompt_token_ids,
            output_token_ids=generation.output_token_ids,
            sampling_params=generation.sampling,
            eos_token_ids=self._eos_token_ids,
            priority=self._priority,
            tenant=self._tenant,
            timeout_s=self._timeout_s(),
            traceparent=self._caller.telemetry.traceparent,
            arrival_unix_s=time.time() - (time.monotonic() - generation.accepted_s),
        )
        if generation.is_prefilling:
            submit.sampling_params.max_tokens = 1
        if generation.kv_source is not None:
            submit.kv_source.CopyFrom(generation.kv_source)
        submit.sampling_params.ClearField("stop")  # the router's to find: it alone has the text
        return submit

    def _timeout_s(self) -> float:
        deadline_s = self._caller.deadline_s
        return 0.0 if deadline_s is None else max(deadline_s - time.monotonic(), 0.001)

    def _why_not_serving(self) -> str:
        refused_by = self._generation.refused_by
        if refused_by and self._pool.any_serving:
            refusals = "; ".join(f"{server_id}: {reason}" for server_id, reason in refused_by.items())
            return f"the attention servers take nothing new ({refusals})"
        return self._pool.why_not_serving()
