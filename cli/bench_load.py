"""The load of ``expertmesh bench serve``: the same requests for three systems, one kind of measurement."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.mesh import rpc
from expertmesh.mesh.client_key import key_metadata
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

REQUEST_TIMEOUT_S = 300.0
_NO_TLS = TlsConfig()
# gRPC gives channels of one process to one address a single connection otherwise.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One request: seconds on one clock when it was sent and when each token arrived."""

    sent_s: float
    token_times_s: Sequence[float]

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.token_times_s[0] - self.sent_s)

    @property
    def tpot_ms(self) -> float:
        """Mean time of an output token after the first."""
        return 1e3 * (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One system at one concurrency: the round with the median throughput, latencies over all rounds."""

    system: str
    concurrency: int
    requests: int
    output_tokens_per_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    tpot_ms_p99: float


def summarise(system: str, concurrency: int, rounds: Sequence[Sequence[Timed]]) -> Measurement:
    timed = [request for requests in rounds for request in requests]
    ttft_ms = [request.ttft_ms for request in timed]
    tpot_ms = [request.tpot_ms for request in timed]
    return Measurement(
        system=system,
        concurrency=concurrency,
        requests=len(timed),
        output_tokens_per_s=statistics.median(map(_tokens_per_s, rounds)),
        ttft_ms_p50=float(np.percentile(ttft_ms, 50)),
        ttft_ms_p99=float(np.percentile(ttft_ms, 99)),
        tpot_ms_p50=float(np.percentile(tpot_ms, 50)),
        tpot_ms_p99=float(np.percentile(tpot_ms, 99)),
    )


def _tokens_per_s(requests: Sequence[Timed]) -> float:
    started_s = min(request.sent_s for request in requests)
    ended_s = max(request.token_times_s[-1] for request in requests)
    return sum(len(request.token_times_s) for request in requests) / (ended_s - started_s)


async def load_router(
    router: str,
    prompts: Sequence[Sequence[int]],
    *,
    concurrency: int,
    num_tokens: int,
    connections: int = 1,
    tls: TlsConfig = _NO_TLS,
    api_key: str | None = None,
) -> list[Timed]:
    """Greedy requests of exactly ``num_tokens`` tokens; a new one starts when one of ``concurrency`` ends.

    Args:
        connections: that requests take in turn; routers that share an address get some of several.
        tls, api_key: as the router's door asks for them.

    Raises:
        grpc.aio.AioRpcError: a request failed.
    """
    slots = asyncio.Semaphore(concurrency)
    sampling = generate_pb2.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    key = key_metadata(api_key)
    async with AsyncExitStack() as channels:
        stubs = []
        for _ in range(connections):
            channel = rpc.open_channel(router, tls, role="router", options=_OWN_CONNECTION)
            stubs.append(generate_pb2_grpc.GenerationServiceStub(await channels.enter_async_context(channel)))

        async def run(stub: generate_pb2_grpc.GenerationServiceStub, prompt: Sequence[int]) -> Timed:
            tokenized = generate_pb2.TokenizedInput(input_ids=prompt)
            request = generate_pb2.GenerateRequest(tokenized=tokenized, sampling_params=sampling)
            async with slots:
                sent_s = time.perf_counter()
                times_s: list[float] = []
                async for message in stub.Generate(request, timeout=REQUEST_TIMEOUT_S, metadata=key):
                    times_s += [time.perf_counter()] * len(message.token_ids)
            return Timed(sent_s=sent_s, token_times_s=times_s)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(stub, prompt)) for stub, prompt in zip(cycle(stubs), prompts, strict=False)]
    return [task.result() for task in tasks]


class TransformersBaseline:
    """transformers' ``generate`` in this process: static batches of ``concurrency``, left-padded, one after another."""

    def __init__(self, path: Path, num_threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def load(self, prompts: Sequence[Sequence[int]], *, concurrency: int, num_tokens: int) -> list[Timed]:
        batches = [prompts[start : start + concurrency] for start in range(0, len(prompts), concurrency)]
        return [timed for batch in batches for timed in self._batch(batch, num_tokens)]

    def _batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Timed]:
        from transformers import GenerationConfig, StoppingCriteriaList

        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        times_s: list[float] = []

        def stamp(ids_BT: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times_s.append(time.perf_counter())
            return torch.zeros(ids_BT.shape[0], dtype=torch.bool)

        sent_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stamp]),
            )
        return [Timed(sent_s=sent_s, token_times_s=times_s) for _ in prompts]
