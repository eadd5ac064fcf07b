"""Clients that share no code with the mesh: ``buf curl``, and Node's gRPC. Reflection tells them all they know."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertmesh.mesh.client import Completion, GenerateClient, build_request
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S
from support.node import node_script

pytestmark = pytest.mark.slow

TIMEOUT_S = 120
FOREIGN = Path(__file__).parents[1] / "foreign"
PROMPT, NUM_TOKENS = "Am nächsten Morgen", 12
REQUEST = {"text": PROMPT, "sampling_params": {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}}
STANDARD = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
ROUTER_SERVICES = STANDARD | {"expertmesh.v1.GenerationService", "vllm.grpc.engine.VllmEngine"}
RANK_SERVICES = {"attention": STANDARD | {"expertmesh.v1.AttentionService"}, "expert": STANDARD}


async def own_answer(live: LiveMesh) -> Completion:
    async with GenerateClient(live.router) as client:
        request = build_request(PROMPT, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return await client.complete(request, timeout_s=REQUEST_TIMEOUT_S)


def addresses(live: LiveMesh) -> dict[str, str]:
    """Of every server but the router, by id."""
    others = {server.id: server.address for server in live.mesh.servers.values() if server.role != "router"}
    return {server_id: address for server_id, address in others.items() if address is not None}


def assert_streams_the_answer(messages: list[dict[str, Any]], expected: Completion, token_ids: str) -> None:
    """``token_ids``: the JSON name of that field, which differs between protobuf's mappings."""
    assert len(messages) > 1, "a stream comes in pieces"
    assert "".join(message.get("text", "") for message in messages) == expected.text
    assert [token for message in messages for token in message.get(token_ids, [])] == expected.token_ids
    finish = messages[-1]["finish"]
    assert finish["reason"] == "FINISH_REASON_LENGTH"
    assert not any(message.get("finish") for message in messages[:-1])


# -- buf curl -------------------------------------------------------------------------------------------------------


def buf_curl(url: str, *arguments: str) -> str:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert buf is not None, "buf-bin is in the extra `dev`"
    command = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, url]
    return output_of(command)


def output_of(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


async def test_buf_curl_lists_services(live: LiveMesh) -> None:
    assert set(buf_curl(f"http://{live.router}", "--list-services").split()) == ROUTER_SERVICES
    methods = set(buf_curl(f"http://{live.router}", "--list-methods").split())
    assert {f"expertmesh.v1.GenerationService/{name}" for name in ("Generate", "GenerateUnary", "Abort")} <= methods
    for server_id, address in addresses(live).items():
        services = set(buf_curl(f"http://{address}", "--list-services").split())
        role = live.mesh.servers[server_id].role
        if role == "balancer":
            expected = STANDARD | {"expertmesh.v1.AdminService", "expertmesh.v1.MembershipService"}
        else:
            expected = RANK_SERVICES[role]
        assert services == expected, server_id


async def test_buf_curl_checks_health(live: LiveMesh) -> None:
    asked = [(address, "") for address in (live.router, *addresses(live).values())]
    for address, service in [*asked, (live.router, "expertmesh.v1.GenerationService")]:
        url = f"http://{address}/grpc.health.v1.Health/Check"
        assert json.loads(buf_curl(url, "--data", json.dumps({"service": service}))) == {"status": "SERVING"}, address


async def test_buf_curl_streams_a_generation(live: LiveMesh) -> None:
    url = f"http://{live.router}/expertmesh.v1.GenerationService/Generate"
    messages = json_objects(buf_curl(url, "--data", json.dumps(REQUEST)))
    assert_streams_the_answer(messages, await own_answer(live), "tokenIds")


def json_objects(text: str) -> list[dict[str, Any]]:
    decoder, objects = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        objects.append(value)
        text = text[end:]
    return objects


# -- Node -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command line of tests/foreign/client.mjs, installed in a folder of its own."""
    folder = tmp_path_factory.mktemp("node")
    yield node_script(FOREIGN, "client.mjs", folder)
    shutil.rmtree(folder)


async def test_node_client(live: LiveMesh, node_client: list[str]) -> None:
    others = list(addresses(live).values())
    answers = json.loads(output_of([*node_client, live.router, json.dumps(REQUEST), *others]))
    assert set(answers["services"]) == ROUTER_SERVICES
    assert answers["health"] == dict.fromkeys([live.router, *others], "SERVING")
    assert_streams_the_answer(answers["messages"], await own_answer(live), "token_ids")
