"""Greedy streams that never stop, each compared token for token with what transformers generates."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc
from support.mesh import demo_prompts
from support.reference import encode, greedy

NUM_STREAMS = 32
DEADLINE_S = 120.0
MODEL = Path(__file__).parents[2] / "demo/model"


@dataclass(frozen=True, kw_only=True)
class Question:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def questions(num_tokens: int) -> list[Question]:
    """One for each prompt that the project ships, answered by transformers' greedy search."""
    prompts = tuple(encode(MODEL, prompt.text) for prompt in demo_prompts())
    answers = greedy(MODEL, prompts, num_tokens, None)
    return [Question(prompt=prompt, answer=answer) for prompt, answer in zip(prompts, answers, strict=True)]


@dataclass(kw_only=True)
class Recording:
    """One request as its client saw it. Times are on ``time.monotonic``."""

    question: Question
    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    finish: generate_pb2.Finish | None = None
    error: str = ""

    @property
    def is_lost(self) -> bool:
        """It did not end with its full output."""
        return self.finish is None or self.finish.reason != generate_pb2.FINISH_REASON_LENGTH

    @property
    def is_wrong(self) -> bool:
        """A token is not the reference's: another one, repeated, skipped, or one too many."""
        expected = self.question.answer
        return tuple(self.token_ids) != (expected if not self.is_lost else expected[: len(self.token_ids)])

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens after the first."""
        return (self.arrived_s[-1] - self.arrived_s[0]) / max(1, len(self.token_ids) - 1)

    def gaps(self) -> Iterator[tuple[float, float]]:
        """(from, to) between one message with tokens and the next."""
        return itertools.pairwise(self.arrived_s)


class Traffic:
    """``num_streams`` requests at any time, from ``async with`` to ``stop``; who ends one starts the next.

    Args:
        seed: chooses which question follows which.
    """

    def __init__(self, router: str, asked: Sequence[Question], seed: int, *, num_streams: int = NUM_STREAMS) -> None:
        self._router = router
        self._questions = asked
        self._seed = seed
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._flowing = [asyncio.Event() for _ in range(num_streams)]
        self._ended = asyncio.Condition()
        self.recordings: list[Recording] = []

    async def __aenter__(self) -> Self:
        self._channel = rpc.open_channel(self._router, TlsConfig())
        stub = generate_pb2_grpc.GenerationServiceStub(self._channel)
        self._tasks = [asyncio.create_task(self._ask_on(stub, number)) for number in range(len(self._flowing))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def until_flowing(self) -> None:
        """Until every stream has tokens that came after this call, whichever request they belong to."""
        for event in self._flowing:
            event.clear()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(event.wait() for event in self._flowing))

    async def until_ended(self, count: int) -> list[Recording]:
        """Until so many requests have ended since the start; returns those that have."""
        async with asyncio.timeout(DEADLINE_S), self._ended:
            await self._ended.wait_for(lambda: len(self._with_an_end()) >= count)
        return self._with_an_end()

    def _with_an_end(self) -> list[Recording]:
        return [recording for recording in self.recordings if recording.finish is not None]

    async def stop(self) -> None:
        """Let the requests that run end, and start no more."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, stub: generate_pb2_grpc.GenerationServiceStub, number: int) -> None:
        choices = random.Random(f"{self._seed} {number}")
        while not self._stopping:
            recording = Recording(question=choices.choice(self._questions), sent_s=time.monotonic())
            self.recordings.append(recording)
            await self._ask(stub, recording, self._flowing[number])
            async with self._ended:
                self._ended.notify_all()

    async def _ask(
        self, stub: generate_pb2_grpc.GenerationServiceStub, recording: Recording, flowing: asyncio.Event
    ) -> None:
        question = recording.question
        request = build_request(question.prompt, max_tokens=len(question.answer), temperature=0.0, ignore_eos=True)
        try:
            async for message in stub.Generate(request, timeout=DEADLINE_S):
                assert recording.finish is None, "a message came after the finish"
                recording.token_ids += message.token_ids
                if message.token_ids:
                    recording.arrived_s.append(time.monotonic())
                    flowing.set()
                if message.HasField("finish"):
                    recording.finish = message.finish
        except grpc.aio.AioRpcError as error:
            recording.error = f"{error.code().name}: {error.details()}"
            await asyncio.sleep(0.1)  # a mesh that refuses everything is not asked in a busy loop
