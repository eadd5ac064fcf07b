"""What routers know of the load of attention servers where there are several routers, and what comes of it."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import pytest

from expertmesh.mesh.config import TlsConfig
from expertmesh.router.admission import Admission
from expertmesh.router.errors import Refusal
from expertmesh.router.generation import Generation
from expertmesh.router.links import AttentionLink
from expertmesh.router.selection import Candidate, choose
from expertmesh.v1 import attention_pb2, generate_pb2

TOKENS = 100
"""Of every request, its prompt and what it generates."""
GENERATION: Any = None
"""Nothing comes of the requests of this module."""


def link_to(server_id: str) -> AttentionLink:
    return AttentionLink(
        server_id=server_id,
        address="127.0.0.1:1",
        role="attention",
        hello=attention_pb2.LinkHello(),
        tls=TlsConfig(),
        on_change=lambda: None,
    )


def report(link: AttentionLink, outstanding_tokens: int, num_routers: int) -> None:
    """As the server would, after a step."""
    load = attention_pb2.AttentionLoad(serving=True, outstanding_tokens=outstanding_tokens, num_routers=num_routers)
    link._on_response(attention_pb2.LinkResponse(load=load))


def send(link: AttentionLink) -> None:
    generation: Generation = GENERATION
    sampling = generate_pb2.SamplingParams(max_tokens=TOKENS - 10)
    link.submit(generation, attention_pb2.Submit(prompt_token_ids=range(1, 11), sampling_params=sampling))


def test_what_was_just_sent_counts_beside_what_others_have_there() -> None:
    link = link_to("a")
    report(link, 5000, num_routers=2)
    send(link)
    assert link.outstanding_tokens == 5000 + TOKENS
    report(link, 5000 + TOKENS, num_routers=2)
    assert link.outstanding_tokens == 5000 + TOKENS
    report(link, 0, num_routers=1)  # it has not seen ours yet
    assert link.outstanding_tokens == TOKENS


def test_a_server_that_does_not_say_how_many_routers_it_has_has_one() -> None:
    link = link_to("a")
    report(link, 0, num_routers=3)
    assert link.num_routers == 3
    report(link, 0, num_routers=0)
    assert link.num_routers == 1


def spread(num_routers: int, draw: random.Random | None, servers: str = "abcdefgh") -> int:
    """Tokens between the most and the least loaded server when every router has sent a request for each of them, all
    within one step: none hears of the others. Server a had nothing to do before, each other one two requests."""
    loads = dict.fromkeys(servers, 2 * TOKENS) | {"a": 0}
    for _ in range(num_routers):
        links = {name: link_to(name) for name in servers}
        for name, link in links.items():
            report(link, 2 * TOKENS if name != "a" else 0, num_routers)
        for _ in servers:
            candidates = [
                Candidate(server_id=name, outstanding_tokens=link.outstanding_tokens) for name, link in links.items()
            ]
            chosen = choose(candidates, [1], affinity_tokens=0, slack_tokens=0, draw=draw)
            assert chosen is not None
            send(links[chosen.server_id])
            loads[chosen.server_id] += TOKENS
    return max(loads.values()) - min(loads.values())


def test_routers_do_not_all_send_to_the_server_that_was_least_loaded() -> None:
    assert spread(1, None) <= TOKENS
    # Three requests of each, before any knows of the others'.
    herd = spread(8, None)
    assert herd >= 8 * TOKENS
    assert statistics.mean(spread(8, random.Random(seed)) for seed in range(20)) <= herd / 2


@pytest.mark.parametrize("affinity_tokens", [0, 4])
def test_the_less_loaded_of_two_is_never_the_most_loaded(affinity_tokens: int) -> None:
    servers = [Candidate(server_id=name, outstanding_tokens=load) for name, load in (("a", 0), ("b", 5), ("c", 9))]
    for seed in range(50):
        draw = random.Random(seed)
        chosen = choose(servers, [seed], affinity_tokens=affinity_tokens, slack_tokens=0, draw=draw)
        assert chosen is not None
        assert chosen.server_id != "c"


def test_a_deadline_is_held_against_the_requests_that_the_pace_is_that_of() -> None:
    """Two routers, each with half of what waits: what the servers say is twice this router's share."""
    now_s = [time.monotonic()]
    admission = Admission(max_requests=99, max_requests_per_tenant=99, clock=lambda: now_s[0], backlog=lambda: 20)
    for number in range(10):
        admission.admit(f"waits {number}", "")
        for _ in range(2):  # placed, lost and placed again: it is one
            admission.may_shed(f"waits {number}", lambda refusal: None)
    for _ in range(60):
        admission.admit("r", "")
        now_s[0] += 0.5
        admission.release("r")
    admission.admit("in time", "", timeout_s=6.0)
    with pytest.raises(Refusal, match=r"10 requests wait, about 5\.0 s"):
        admission.admit("too late", "", timeout_s=4.0)
    for number in range(10):
        for _ in range(2):
            admission.may_shed(f"waits {number}", None)
    admission.admit("nothing of ours waits", "", timeout_s=0.1)
