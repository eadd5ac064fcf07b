"""A router whose attention servers are lost, leave or refuse: requests go on at another one, or end with a reason."""

from __future__ import annotations

import asyncio

import grpc

from expertmesh.mesh.client import build_request
from support.fake_attention import FakeAttention, expected_tokens
from support.refusals import refusal
from support.router_stand import PROMPT, Stand, ask, stand

__all__ = ["stand"]


async def test_a_lost_server_is_replayed_without_a_repeated_or_skipped_token(stand: Stand) -> None:
    servers = [FakeAttention("a0", max_steps=5), FakeAttention("a1", max_steps=9), FakeAttention("a2")]
    client = await stand.start(servers)
    answers = await asyncio.gather(*(client.complete(ask(max_tokens=40, seed=seed)) for seed in range(12)))
    for seed, answer in enumerate(answers):
        assert answer.token_ids == expected_tokens(PROMPT, seed, 40)
    assert sum(answer.finish.replays for answer in answers) > 0


async def test_unset_seed_stays_the_same_in_a_replay(stand: Stand) -> None:
    servers = [FakeAttention("a0", max_steps=3), FakeAttention("a1", max_steps=3), FakeAttention("a2", max_steps=3)]
    client = await stand.start(servers)
    answer = await client.complete(build_request(PROMPT, max_tokens=8))
    submits = [submit for server in servers for submit in server.submits]
    assert len(submits) == 1 + answer.finish.replays > 1
    seed = submits[0].sampling_params.seed
    assert {submit.sampling_params.seed for submit in submits} == {seed}
    assert answer.token_ids == expected_tokens(PROMPT, seed, 8)


async def test_replays_are_bounded_and_can_be_disabled(stand: Stand) -> None:
    server = FakeAttention("a0", max_steps=1)
    client = await stand.start([server], replay_attempts=0)
    refused = await refusal(client.complete(ask(max_tokens=50)))
    assert (refused.code(), "replay_attempts" in (refused.details() or "")) == (grpc.StatusCode.UNAVAILABLE, True)


async def test_disable_replay(stand: Stand) -> None:
    client = await stand.start([FakeAttention("a0", max_steps=1), FakeAttention("a1", max_steps=1)])
    refused = await refusal(client.complete(ask(max_tokens=50, disable_replay=True)))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_left_the_view_is_replaced(stand: Stand) -> None:
    old, new = FakeAttention("a0"), await FakeAttention("a1").start()
    stand.servers.append(new)
    client = await stand.start([old])
    old.going.clear()
    running = asyncio.create_task(client.complete(ask(max_tokens=6)))
    await old.until(lambda: old.num_running == 1)
    old.step()
    stand.balancer.publish([new])
    assert (await running).token_ids == expected_tokens(PROMPT, 1, 6)
    assert list(new.submits[0].output_token_ids) == expected_tokens(PROMPT, 1, 1)


async def test_a_running_request_without_deadline_does_not_outwait_a_dead_mesh(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server], no_capacity_timeout_s=0.3)
    server.going.clear()
    running = asyncio.create_task(client.complete(ask()))
    await server.until(lambda: server.num_running == 1)
    await server.set_serving(False)
    refused = await refusal(running)
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    await server.until(lambda: server.num_running == 0)


async def test_a_request_that_ran_for_long_is_replayed_when_its_server_is_lost(stand: Stand) -> None:
    """Its patience with a mesh that does not serve begins with the loss, not with its own start."""
    server = FakeAttention("a0")
    client = await stand.start([server], no_capacity_timeout_s=0.5)
    server.going.clear()
    running = asyncio.create_task(client.complete(ask()))
    await server.until(lambda: server.num_running == 1)
    server.step()
    await asyncio.sleep(0.6)  # the time itself is what matters
    server.break_links()
    await server.until(lambda: len(server.submits) == 2)
    server.going.set()
    answer = await running
    assert (answer.token_ids, answer.finish.replays) == (expected_tokens(PROMPT, 1, 8), 1)


async def test_a_refusing_server_is_passed_over(stand: Stand) -> None:
    servers = [FakeAttention("a0"), FakeAttention("a1")]
    client = await stand.start(servers, no_capacity_timeout_s=0.3)
    servers[0].refusal = (grpc.StatusCode.UNAVAILABLE, "draining")
    answers = await asyncio.gather(*(client.complete(ask(seed=seed, prompt=[seed + 2])) for seed in range(8)))
    assert all(len(answer.token_ids) == 8 for answer in answers)
    servers[1].refusal = (grpc.StatusCode.UNAVAILABLE, "draining too")
    refused = await refusal(client.complete(ask()))
    assert (refused.code(), "draining" in (refused.details() or "")) == (grpc.StatusCode.UNAVAILABLE, True)
    servers[0].refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "attention.max_waiting")
    servers[1].refusal = servers[0].refusal
    assert (await refusal(client.complete(ask()))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
