"""A whole mesh with certificates and keys: it generates what it should, and nobody else gets anything from it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from expertmesh.cli.up import page_address
from expertmesh.mesh import rpc
from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.identity import guest_id
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import (
    attention_pb2,
    attention_pb2_grpc,
    generate_pb2,
    mesh_pb2,
    mesh_pb2_grpc,
)
from support import reference
from support.mesh import demo_prompts
from support.otlp_collector import running_collector
from support.refusals import code_of, refusal, until_code
from support.secure_mesh import NUM_TOKENS, SecureMesh, get_status, https, set_mode
from support.secure_server import TIMEOUT_S, tls_as

pytestmark = [pytest.mark.security, pytest.mark.slow]

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureMesh]:
    with running_collector() as collector:
        running = SecureMesh(tmp_path_factory.mktemp("secure"), collector)
        yield running
        running.mesh.stop()


PROMPTS = tuple(reference.encode(demo_model_path(), prompt.text)[:32] for prompt in demo_prompts()[:4])


async def test_the_reference_tokens_over_mutual_tls_with_a_key(secure: SecureMesh) -> None:
    answers = await asyncio.gather(*(secure.ask(secure.generate, prompt) for prompt in PROMPTS))
    expected = reference.greedy(demo_model_path(), PROMPTS, NUM_TOKENS, None)
    assert [tuple(answer.token_ids) for answer in answers] == list(expected)


def test_every_command_of_a_client_connects_with_what_the_configuration_and_the_environment_say(
    secure: SecureMesh, tmp_path: Path
) -> None:
    """Who asks the balancer has the operator's certificate, or a client's and a key; who asks the router a key."""
    app_key, eye_key = tmp_path / "app.key", tmp_path / "eye.key"
    app_key.write_text(f"{secure.generate}\n")
    eye_key.write_text(f"{secure.read}\n")
    router, balancer = ("--router", secure.mesh.router), ("--balancer", secure.mesh.balancer)
    for asked, shown in (
        ("generate Hello --max-tokens 4 --json", "token_ids"),
        ("bench serve --concurrency 1 --num-tokens 2 --json", "output_tokens_per_s"),
    ):
        said = secure.command(*asked.split(), *router, key_file=app_key)
        assert (said.exit_code, shown in said.stdout) == (0, True), said.output
        refused = secure.command(*asked.split(), *router)
        assert (refused.exit_code, "UNAUTHENTICATED" in refused.stderr) == (1, True), refused.output
    for asked, shown in (
        ("top --once --interval 0.1", "balancer"),
        ("balancer status", "serving"),
        ("balancer placement", "slots"),
        ("balancer loads", "layers"),
        ("balancer events", "expert-0"),
        ("balancer watch --count 1", "layers"),
        ("balancer scale", "expert"),
        ("balancer mode static", "previous"),
    ):
        said = secure.command(*asked.split(), "--json", *balancer)
        assert (said.exit_code, shown in said.stdout) == (0, True), (asked, said.output)
    unknown = secure.command("balancer", "drain", "nobody", *balancer)
    assert (unknown.exit_code, "NOT_FOUND" in unknown.stderr) == (1, True), unknown.output
    client = secure.config_as("client")
    for asked, key_file, why in (
        ("status", eye_key, ""),
        ("status", None, "UNAUTHENTICATED"),
        ("mode static", eye_key, "PERMISSION_DENIED"),
    ):
        said = secure.command("balancer", *asked.split(), *balancer, config=client, key_file=key_file)
        assert (said.exit_code, why in said.stderr) == (int(bool(why)), True), said.output


async def test_the_router_refuses_who_has_no_right_key(secure: SecureMesh) -> None:
    for key, code in (
        (None, Code.UNAUTHENTICATED),
        ("emk.app.x", Code.UNAUTHENTICATED),
        (secure.read, Code.PERMISSION_DENIED),
    ):
        assert (await refusal(secure.ask(key, PROMPTS[0]))).code() is code
    async with GenerateClient(secure.mesh.router, None, secure.generate) as plaintext:
        assert (await refusal(plaintext.model_info(timeout_s=TIMEOUT_S))).code() is Code.UNAVAILABLE


async def test_the_balancer_asks_for_a_certificate_and_for_the_scope(secure: SecureMesh) -> None:
    strangers = (
        TlsConfig(),
        TlsConfig(ca_file=secure.tls / "ca.pem"),
        tls_as(secure.tls / "other", "operator", secure.tls / "ca.pem"),
        tls_as(secure.tls / "expired", "operator"),
    )
    for tls in strangers:
        async with secure.balancer(tls, secure.admin) as channel:
            assert (await refusal(get_status(channel))).code() is Code.UNAVAILABLE, tls
    for name, key, reads, writes in (
        ("client", None, Code.UNAUTHENTICATED, Code.UNAUTHENTICATED),
        ("client", secure.generate, Code.PERMISSION_DENIED, Code.PERMISSION_DENIED),
        ("client", secure.read, Code.OK, Code.PERMISSION_DENIED),
        ("client", secure.admin, Code.OK, Code.OK),
        ("operator", None, Code.OK, Code.OK),
        ("expert-0", secure.admin, Code.PERMISSION_DENIED, Code.PERMISSION_DENIED),
    ):
        async with secure.balancer(secure.as_(name), key) as channel:
            assert (await code_of(get_status(channel)), await code_of(set_mode(channel))) == (reads, writes), name


async def test_the_page_shows_nothing_of_the_mesh_without_a_key(secure: SecureMesh) -> None:
    url = await page_address(secure.mesh)
    assert url.startswith("https://")
    authority = secure.tls / "ca.pem"
    for key, status in ((None, 401), (secure.generate, 401), (secure.read, 200)):
        assert (await asyncio.to_thread(https, f"{url}/api/status", authority, key))[0] == status
    assert (await asyncio.to_thread(https, f"{url}/", authority))[0] == 200


async def test_links_between_ranks_use_tls_and_metrics_ask_for_the_key(secure: SecureMesh) -> None:
    logs = {path.stem: path.read_text() for path in secure.mesh.state_dir.rglob("*.log")}
    ranks = {name: text for name, text in logs.items() if name.startswith(("attention", "expert"))}
    assert len(ranks) == 3
    assert all("links to other ranks use TLS" in text for text in ranks.values())
    for name, text in logs.items():
        (url,) = re.findall(r"metrics on (https://\S+)", text)
        for key, status in ((None, 401), (secure.generate, 403), (secure.read, 200)):
            assert (await asyncio.to_thread(https, url, secure.tls / "ca.pem", key))[0] == status, name


async def test_the_http_door_asks_for_the_same_keys(secure: SecureMesh) -> None:
    url, authority = f"https://{secure.mesh.http}/v1/completions", secure.folder / "door" / "ca.pem"
    body = {"model": "", "prompt": list(PROMPTS[0]), "max_tokens": 4, "temperature": 0}
    for key, status in ((None, 401), ("emk.app.x", 401), (secure.read, 403), (secure.generate, 200)):
        answered, said = await asyncio.to_thread(https, url, authority, key, body)
        assert answered == status, said
    once = secure.keys.add("once", "generate", requests_per_s=0.01)
    async with asyncio.timeout(TIMEOUT_S):
        while (answered := (await asyncio.to_thread(https, url, authority, once, body))[0]) == 401:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert answered == 200
    assert (await asyncio.to_thread(https, url, authority, once, body))[0] == 429


async def test_nobody_registers_as_a_server_whose_certificate_they_have_not(secure: SecureMesh) -> None:
    async with secure.balancer(secure.as_("operator")) as channel:
        before = await get_status(channel)
    known = next(server for server in before.servers if server.server_id == "expert-0")
    of_expert = _registration("expert-0", mesh_pb2.ROLE_EXPERT, known.incarnation)
    of_expert.fingerprint = before.fingerprint
    attempts = {
        "an attention server as an expert": ("attention-0", _registration("attention-0", mesh_pb2.ROLE_EXPERT)),
        "an attention server as another one": ("attention-0", _registration("attention-9", mesh_pb2.ROLE_ATTENTION)),
        "a router as another one's guest": ("router-0", _registration("router-9@decode", mesh_pb2.ROLE_ROUTER)),
        "an expert as a router": ("expert-0", _registration("expert-0", mesh_pb2.ROLE_ROUTER)),
        "a client": ("client", of_expert),
        "an operator": ("operator", of_expert),
        "a neighbour that replays a registration": ("expert-1", of_expert),
        # Incarnations are no secret: every server reads them in the view.
        "a thief of the certificate who replays the registration": ("expert-0", of_expert),
    }
    for what, (name, registration) in attempts.items():
        async with secure.balancer(secure.as_(name)) as channel:
            join = mesh_pb2_grpc.MembershipServiceStub(channel).Join(timeout=TIMEOUT_S)
            # Who is not let in at all is told before they say anything, and gRPC's client may trip over saying it.
            if name not in ("client", "operator"):
                await join.write(mesh_pb2.JoinRequest(registration=registration))
            await code_of(join.read())
            assert await join.code() is Code.PERMISSION_DENIED, what
    async with secure.balancer(secure.as_("operator")) as channel:
        after = await get_status(channel)
    assert after.serving
    assert after.view_number == before.view_number
    assert {(s.server_id, s.incarnation, s.pid) for s in after.servers} == {
        (s.server_id, s.incarnation, s.pid) for s in before.servers
    }
    assert len((await secure.ask(secure.generate, PROMPTS[0])).token_ids) == NUM_TOKENS


async def test_a_router_of_another_mesh_is_let_in_under_its_own_certificate(secure: SecureMesh) -> None:
    """As the mesh that computes its prompts does; it has a router of that name already."""
    async with secure.balancer(secure.as_("operator")) as channel:
        registration = _registration(guest_id("router-0", "decode"), mesh_pb2.ROLE_ROUTER)
        registration.fingerprint = (await get_status(channel)).fingerprint
    async with secure.balancer(secure.as_("router-0")) as channel:
        join = mesh_pb2_grpc.MembershipServiceStub(channel).Join(timeout=TIMEOUT_S)
        await join.write(mesh_pb2.JoinRequest(registration=registration))
        first = await join.read()
        assert isinstance(first, mesh_pb2.JoinResponse), await join.details()
        assert first.WhichOneof("message") == "welcome"
        await join.write(mesh_pb2.JoinRequest(leaving=mesh_pb2.Leaving(reason="it was a visit")))
        await join.done_writing()
    assert len((await secure.ask(secure.generate, PROMPTS[0])).token_ids) == NUM_TOKENS


def _registration(
    server_id: str, role: mesh_pb2.Role.ValueType, incarnation: str = "impostor"
) -> mesh_pb2.Registration:
    shape = mesh_pb2.ModelShape(name="m", family="f", num_experts=8, moe_layers=[0], bytes_per_expert=1)
    return mesh_pb2.Registration(
        server_id=server_id,
        incarnation=incarnation,
        role=role,
        grpc_address="127.0.0.1:1",
        rank_address="127.0.0.1:1",
        num_slots=8,
        fingerprint="f",
        model=shape,
    )


async def test_only_a_router_links_to_an_attention_server(secure: SecureMesh) -> None:
    address = secure.mesh.servers["attention-0"].address
    assert address is not None
    hello = attention_pb2.LinkRequest(hello=attention_pb2.LinkHello(router_id="r"))
    for name, code in (("expert-0", Code.PERMISSION_DENIED), ("router-0", Code.FAILED_PRECONDITION)):
        async with rpc.open_channel(address, secure.as_(name), role="attention") as channel:
            link = attention_pb2_grpc.AttentionServiceStub(channel).Link(timeout=TIMEOUT_S)
            if name == "router-0":  # the other one is told before it says anything
                await link.write(hello)
            await code_of(link.read())
            assert await link.code() is code
    denied = [json.loads(line) for line in secure.audit.read_text().splitlines()][-1]
    assert (denied["server"], denied["who"]["certificate"]) == ("attention-0", "CN=expert-0")


async def until_known(secure: SecureMesh, key: str) -> None:
    await until_code(lambda: secure.ask(key, PROMPTS[0][:2]), Code.OK)


async def test_a_rotated_key_is_the_only_one_within_a_moment(secure: SecureMesh) -> None:
    old = secure.keys.add("temp", "generate")
    await until_known(secure, old)
    new = secure.keys.add("temp", "generate")
    await until_known(secure, new)
    assert (await refusal(secure.ask(old, PROMPTS[0][:2]))).code() is Code.UNAUTHENTICATED


async def test_the_tokens_of_a_key_are_counted(secure: SecureMesh) -> None:
    few = secure.keys.add("few", "generate", tokens_per_min=30.0)
    await until_known(secure, few)  # 2 tokens of the prompt, 24 generated
    assert len((await secure.ask(few, PROMPTS[0])).token_ids) == NUM_TOKENS, "what is left lets one more begin"
    refused = await refusal(secure.ask(few, PROMPTS[0]))
    assert (refused.code(), "tokens_per_min" in (refused.details() or "")) == (Code.RESOURCE_EXHAUSTED, True)
    (hint,) = [int(value) for name, value in refused.trailing_metadata() if name == "retry-after-ms"]
    # The first two took 26 of 30 tokens, the next 56 more: 53 have to come in at one in two seconds.
    assert 60_000 < hint <= 106_000


async def test_a_request_is_aborted_by_its_own_key_alone(secure: SecureMesh) -> None:
    other = secure.keys.add("other", "generate")
    await until_known(secure, other)
    # The tenant that a request names gives it nothing: the key's goes before it.
    request = build_request(PROMPTS[0], max_tokens=900, ignore_eos=True, request_id="mine", tenant="other")
    async with secure.client(secure.generate) as mine, secure.client(other) as others:
        stream = mine.stream(request, timeout_s=TIMEOUT_S)
        await anext(stream)
        assert not await others.abort("mine", timeout_s=TIMEOUT_S)
        assert await mine.abort("mine", timeout_s=TIMEOUT_S)
        *_, last = [response async for response in stream]
        assert last.finish.reason == generate_pb2.FINISH_REASON_CANCELLED


async def test_what_happened_is_in_the_audit_file(secure: SecureMesh) -> None:
    async with secure.balancer(secure.as_("client"), secure.admin) as channel:
        await set_mode(channel)
    async with secure.balancer(secure.as_("client"), secure.read) as channel:
        await refusal(set_mode(channel))
    lines = [json.loads(line) for line in secure.audit.read_text().splitlines()]
    did = [line for line in lines if line["event"] == "admin" and line["who"].get("key") == "ops"][-1]
    assert (did["outcome"], did["method"], did["request"]) == (
        "OK",
        "/expertmesh.v1.AdminService/SetMode",
        {"mode": "static"},
    )
    assert (did["server"], did["who"]["certificate"]) == ("balancer", "CN=client")
    denied = lines[-1]
    assert (denied["event"], denied["outcome"], denied["who"]["key"]) == ("denied", "PERMISSION_DENIED", "eye")


async def test_no_secret_is_in_logs_spans_command_lines_or_environments(secure: SecureMesh) -> None:
    await secure.ask(secure.generate, PROMPTS[0])
    await asyncio.to_thread(secure.collector.wait_for, lambda: bool(secure.collector.spans))
    secrets = [key.rpartition(".")[2] for key in (secure.generate, secure.read, secure.admin)]
    secrets += [line for path in secure.tls.glob("*.key") for line in path.read_text().splitlines()[1:-1]]
    places = {str(path): path.read_bytes() for path in secure.mesh.state_dir.rglob("*") if path.is_file()}
    places["audit"] = secure.audit.read_bytes()
    places["spans"] = "\n".join(str(span) for span in secure.collector.spans).encode()
    for server in secure.mesh.servers.values():
        process = psutil.Process(server.pid)
        places[f"{server.id} command line"] = " ".join(process.cmdline()).encode()
        places[f"{server.id} environment"] = str(process.environ()).encode()
        assert process.rlimit(psutil.RLIMIT_CORE)[0] == 0, "a core file would hold secrets"
    assert any("router-0.log" in place and text for place, text in places.items())
    found = [place for place, text in places.items() for secret in secrets if secret.encode() in text]
    assert found == []
