"""One router's link: what waits for it, and the messages that this becomes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc

from expertmesh.attention_server.kv_transport import KvSource
from expertmesh.attention_server.outputs import Load, Output
from expertmesh.v1 import attention_pb2, generate_pb2


@dataclass(eq=False)
class RouterLink:
    """One router's stream. ``outputs`` and ``load`` wait for the writer; ``closed`` says why there will be no more."""

    number: int
    router_id: str
    takes_columns: bool
    outputs: list[Output] = field(default_factory=list)
    load: Load | None = None
    sent_load: Load | None = None
    told_routers: int = 0
    closed: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


def take_response(link: RouterLink, kv_source: KvSource | None, num_routers: int) -> attention_pb2.LinkResponse | None:
    """All that waits for a link as one message.

    Args:
        num_routers: that have a link, this one included.
    """
    if not link.outputs and link.load is None:
        return None
    handles, token_ids, others = _columns(link.outputs) if link.takes_columns else ([], [], link.outputs)
    response = attention_pb2.LinkResponse(
        deltas=[_delta(output) for output in others], handles=handles, token_ids=token_ids
    )
    if link.load is not None:
        response.load.CopyFrom(_load_message(link.load))
        response.load.num_routers = link.told_routers = num_routers
        if kv_source is not None:
            told = attention_pb2.KvSource(
                address=kv_source.address, ticket=kv_source.ticket, nixl_digest=kv_source.nixl_digest
            )
            response.load.kv_source.CopyFrom(told)
        link.sent_load = link.load
    link.outputs = []
    link.load = None
    return response


def _columns(outputs: list[Output]) -> tuple[list[int], list[int], list[Output]]:
    """Handles and tokens of the outputs that are a token and nothing else, and the others.

    Columns are read first: what follows another output of its sequence stays behind it.
    """
    handles: list[int] = []
    token_ids: list[int] = []
    others: list[Output] = []
    others_of: set[int] = set()
    for output in outputs:
        token, handle = output.token, output.handle
        says_more = output.finish or output.cached_tokens or output.logprobs is not None
        if token is None or says_more or output.code is not grpc.StatusCode.OK or handle in others_of:
            others.append(output)
            others_of.add(handle)
        else:
            handles.append(handle)
            token_ids.append(token)
    return handles, token_ids, others


def _delta(output: Output) -> attention_pb2.TokenDelta:
    delta = attention_pb2.TokenDelta(
        handle=output.handle,
        finish_reason=output.finish,
        matched_token_id=output.matched_id,
        cached_tokens=output.cached_tokens,
    )
    if output.token is not None:
        delta.token_ids.append(output.token)
    if output.logprobs is not None and output.token is not None:
        top = zip(output.logprobs.top_ids, output.logprobs.top_values, strict=True)
        delta.logprobs.add(
            token_id=output.token,
            logprob=output.logprobs.chosen,
            top_logprobs=[generate_pb2.TopLogprob(token_id=token, logprob=value) for token, value in top],
        )
    if output.code is not grpc.StatusCode.OK:
        delta.status_code = output.code.value[0]
        delta.error_message = output.message
    return delta


def _load_message(load: Load) -> attention_pb2.AttentionLoad:
    return attention_pb2.AttentionLoad(
        num_requests_running=load.num_running,
        num_requests_waiting=load.num_waiting,
        kv_cache_usage=load.kv_cache_usage,
        num_kv_blocks=load.num_kv_blocks,
        serving=load.serving,
        outstanding_tokens=load.outstanding_tokens,
    )
