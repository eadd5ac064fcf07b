"""kill -9 of any server while streams run: every stream ends with its own tokens, and the mesh becomes whole again."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field

import grpc
import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S, demo_prompts, logs
from support.mesh_state import until

pytestmark = pytest.mark.slow

NUM_STREAMS = 16
NUM_TOKENS = 100
TOKENS_BEFORE_THE_KILL = 10
SHORT_TOKENS = 16
LONGEST_GAP_S = 20.0
"""A view change takes a fifth of a second on a quiet machine, and a lease more if the balancer needs proof; other work
may share the cores."""

Answers = list[tuple[list[int], str]]
PROMPTS = [prompt.text for prompt in demo_prompts()[::2]][:NUM_STREAMS]


def greedy(prompt: str, max_tokens: int) -> generate_pb2.GenerateRequest:
    return build_request(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


@dataclass
class Recording:
    """A stream as its client saw it; ``arrived_s`` of each message on ``time.monotonic``."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    arrived_s: list[float] = field(default_factory=list)
    finish: generate_pb2.Finish | None = None
    runs: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def longest_gap_s(self) -> float:
        return max(after - before for before, after in itertools.pairwise(self.arrived_s))

    async def read(
        self, call: grpc.aio.UnaryStreamCall[generate_pb2.GenerateRequest, generate_pb2.GenerateResponse]
    ) -> None:
        async for message in call:
            assert self.finish is None, "a message came after the finish"
            self.arrived_s.append(time.monotonic())
            self.token_ids += message.token_ids
            self.text += message.text
            if len(self.token_ids) >= TOKENS_BEFORE_THE_KILL:
                self.runs.set()
            if message.HasField("finish"):
                self.finish = message.finish


@pytest.fixture(scope="module")
def known_answers() -> Answers:
    """What the mesh answers while nobody harms it; filled by the first test."""
    return []


async def reference_answers(live: LiveMesh, known: Answers) -> Answers:
    if not known:
        async with GenerateClient(live.router) as client:
            calls = [client.complete(greedy(p, NUM_TOKENS), timeout_s=REQUEST_TIMEOUT_S) for p in PROMPTS]
            known += [(answer.token_ids, answer.text) for answer in await asyncio.gather(*calls)]
    return known


# The attention server is the first rank, which leads the steps.
@pytest.mark.parametrize("victim", ["expert-1", "attention-0", "balancer"])
async def test_killed_server(live: LiveMesh, known_answers: Answers, victim: str) -> None:
    expected = await reference_answers(live, known_answers)
    view_before, starts_before = (await live.status()).view_number, live.mesh.servers[victim].starts
    recordings = [Recording() for _ in PROMPTS]
    async with rpc.open_channel(live.router, TlsConfig()) as channel, asyncio.TaskGroup() as group:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        for recording, prompt in zip(recordings, PROMPTS, strict=True):
            group.create_task(recording.read(stub.Generate(greedy(prompt, NUM_TOKENS), timeout=REQUEST_TIMEOUT_S)))
        for recording in recordings:
            await asyncio.wait_for(recording.runs.wait(), REQUEST_TIMEOUT_S)
        assert all(recording.finish is None for recording in recordings), "too late: a stream has ended"
        live.mesh.kill(victim)
        killed_s = time.monotonic()
    for recording, (token_ids, text) in zip(recordings, expected, strict=True):
        assert (recording.token_ids, recording.text) == (token_ids, text)
        assert recording.finish is not None
        assert recording.finish.reason == generate_pb2.FINISH_REASON_LENGTH

    await serve_until_back(live, expected, victim, starts_before)
    back_s = time.monotonic()
    view_after = (await live.status()).view_number
    longest_gap_s = max(recording.longest_gap_s for recording in recordings)
    ended_s = max(recording.arrived_s[-1] for recording in recordings)
    num_replayed = sum(recording.finish.replays for recording in recordings if recording.finish is not None)
    print(
        f"\n{victim} killed: longest gap {longest_gap_s:.2f} s, all streams ended after {ended_s - killed_s:.2f} s, "
        f"{num_replayed} replays, back in view {view_after} (it died in {view_before}) after {back_s - killed_s:.2f} s"
    )
    assert longest_gap_s < LONGEST_GAP_S
    assert (num_replayed > 0) == victim.startswith("attention")
    if victim == "balancer":
        assert view_after == view_before, "a balancer that comes back adopts the running view"
    await live.until_idle()


async def serve_until_back(live: LiveMesh, expected: Answers, victim: str, starts_before: int) -> None:
    """Requests are answered, and rightly, while the killed server comes back and once it has."""
    indices = itertools.cycle(range(NUM_STREAMS))

    async with GenerateClient(live.router) as client:

        async def answer_is_right() -> None:
            index = next(indices)
            answer = await client.complete(greedy(PROMPTS[index], SHORT_TOKENS), timeout_s=REQUEST_TIMEOUT_S)
            assert answer.token_ids == expected[index][0][:SHORT_TOKENS]

        async def is_back() -> bool:
            await answer_is_right()
            return live.mesh.servers[victim].starts > starts_before and await live.is_whole()

        await until(is_back, REQUEST_TIMEOUT_S, lambda: f"{victim} did not come back\n{logs(live.mesh, 15)}")
        for _ in range(4):
            await answer_is_right()
