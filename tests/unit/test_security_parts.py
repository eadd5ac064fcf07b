"""Keys, limits, identities, audit events: time and files injected, no sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertmesh.balancer.members import find_mistake
from expertmesh.cli import keys as keys_command
from expertmesh.cli.connection import key_for
from expertmesh.cli.state_dir import StateDir
from expertmesh.mesh.access import rule_for
from expertmesh.mesh.api_keys import ApiKey, KeyStore, Limits, digest, dump_key_file, new_secret, read_key_file
from expertmesh.mesh.audit import AuditLog
from expertmesh.mesh.client_key import key_from_environment
from expertmesh.mesh.config import ApiConfig, MeshConfig, TlsConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.identity import guest_id, identity_of, peer_identity
from expertmesh.mesh.telemetry.logs import TextFormatter
from expertmesh.mesh.token_bucket import TokenBucket
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.balancer_parts import registration

pytestmark = pytest.mark.security

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def entry(key_id: str, key: str, **more: object) -> ApiKey:
    return ApiKey.model_validate(
        {"id": key_id, "sha256": digest(key), "scopes": ["generate"], "created": NOW.isoformat(), **more}
    )


def write(path: Path, *entries: ApiKey) -> None:
    path.write_text(dump_key_file({made.id: made for made in entries}))


def test_a_bucket_fills_at_its_rate_and_may_owe() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, 10.0, clock)
    assert bucket.wait_s(10.0) == 0.0
    bucket.take(14.0)
    assert bucket.wait_s(1.0) == pytest.approx(2.5)
    clock.now_s += 2.5
    assert bucket.wait_s(1.0) == pytest.approx(0.0)
    clock.now_s += 1000.0
    assert bucket.wait_s(11.0) == pytest.approx(0.5), "it holds no more than its capacity"


def test_the_tokens_of_one_request_are_waited_for_by_the_next() -> None:
    clock = Clock()
    limits = Limits(entry("a", "x", tokens_per_min=60.0, requests_per_s=1000.0), clock)
    assert limits.take_request() == ("", 0.0)
    limits.charge(90)
    name, wait_s = limits.take_request()
    assert name == "tokens_per_min"
    assert wait_s == pytest.approx(31.0)
    clock.now_s += 31.0
    assert limits.take_request() == ("", 0.0)


def test_a_key_is_found_by_its_hash_until_it_expires(tmp_path: Path) -> None:
    key, _ = new_secret("ci")
    path = tmp_path / "keys.json"
    write(path, entry("ci", key, expires=(NOW + timedelta(hours=1)).isoformat()), entry("other", "emk.other.x"))
    now = [NOW]
    store = KeyStore(path, Clock(), lambda: now[0])
    assert key not in path.read_text()
    found = store.find(key)
    assert found is not None
    assert found.id == "ci"
    for wrong in ("", "emk", "emk.ci.", key[:-1], key + "x", key.replace(".ci.", ".other."), "emk.nobody.x", "\udcff"):
        assert store.find(wrong) is None
    now[0] += timedelta(hours=1)
    assert store.find(key) is None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a file's change has no event
            await asyncio.sleep(0.001)


async def test_a_changed_file_is_followed_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = new_secret("ci")[0], new_secret("ci")[0]
    path = tmp_path / "keys.json"
    write(path, entry("ci", old, requests_per_s=1.0))
    store = KeyStore(path, Clock())
    limits = store.limits(read_key_file(path)["ci"])
    watching = asyncio.create_task(store.watch(0.001))
    try:
        write(path, entry("ci", old, requests_per_s=1.0), entry("more", "emk.more.x"))
        await until(lambda: store.find("emk.more.x") is not None)
        assert store.limits(read_key_file(path)["ci"]) is limits, "what a key has used up stays used up"
        write(path, entry("ci", new))
        await until(lambda: store.find(new) is not None)
        assert store.find(old) is None
        assert store.find("emk.more.x") is None
        path.write_text("{")
        await until(lambda: "stay as they were" in caplog.text)
        assert store.find(new) is not None
        write(path)
        await until(lambda: store.find(new) is None)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"keys": [{"id": "A B"}]}', "keys.0.id"),
        ('{"keys": [], "more": 1}', "more"),
        ("nothing", "Invalid JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_none_names_what_is_wrong(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "keys.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_key_file(path)


def test_the_command_prints_a_key_once_and_keeps_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(keys_command.app, [*arguments, "--file", str(path)])
        if isinstance(done.exception, UserError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    key = run("create", "ci", "--scope", "read", "--scope", "generate", "--days", "2", "--requests-per-s", "3").strip()
    assert read_key_file(path)["ci"].sha256 == digest(key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listed = json.loads(run("list", "--json"))["keys"]
    assert listed[0]["scopes"] == ["read", "generate"]
    assert digest(key) not in json.dumps(listed)
    with pytest.raises(UserError, match="--replace"):
        run("create", "ci")
    rotated = json.loads(run("create", "ci", "--replace", "--json"))["key"]
    assert rotated != key
    assert read_key_file(path)["ci"].sha256 == digest(rotated)
    for arguments, blamed in (
        (("create", "x y"), "ID"),
        (("create", "x", "--scope", "all"), "--scope"),
        (("create", "x", "--days", "0"), "--days"),
        (("create", "x", "--tokens-per-min", "0"), "--tokens-per-min"),
        (("revoke", "nobody"), "no key nobody"),
    ):
        with pytest.raises(UserError, match=blamed):
            run(*arguments)
    run("revoke", "ci")
    assert read_key_file(path) == {}


def test_a_clients_key_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_from_environment() is None
    path = tmp_path / "key"
    path.write_text("emk.a.b\n")
    monkeypatch.setenv("EXPERTMESH_API_KEY_FILE", str(path))
    assert key_from_environment() == "emk.a.b"
    monkeypatch.setenv("EXPERTMESH_API_KEY", "emk.c.d")
    assert key_from_environment() == "emk.c.d"
    monkeypatch.setenv("EXPERTMESH_API_KEY", "emk\r\nx: y")
    with pytest.raises(UserError, match="EXPERTMESH_API_KEY"):
        key_from_environment()


def test_what_a_certificate_may_be() -> None:
    tls = TlsConfig()
    one = identity_of(["expert.mesh.expertmesh", "expert-0.expert.mesh.expertmesh", "localhost"], tls)
    assert one.why_not("expert", "expert-0") == ""
    assert "not for expert-1" in one.why_not("expert", "expert-1")
    assert "not for attention" in one.why_not("attention", "expert-0")
    whole_role = identity_of(["router.mesh.expertmesh"], tls)
    assert whole_role.why_not("router", "any") == ""
    assert identity_of(["router.other.domain", "xmesh.expertmesh"], tls).roles == frozenset()
    both = TlsConfig(cert_file=Path("c"), key_file=Path("k"), ca_file=Path("a"))
    assert peer_identity({"peer_dns": [b"both.mesh.expertmesh"]}, tls) is None, "without an authority it says nothing"
    spoken = peer_identity(
        {"peer_dns": [b"both.mesh.expertmesh"], "x509_subject_alternative_name": [b"operator.mesh.expertmesh"]}, both
    )
    assert spoken is not None
    assert spoken.roles == {"both"}


def test_every_method_of_the_contracts_has_its_rule() -> None:
    writes = {"Apply", "SetMode", "Drain", "SetScale", "Record"}
    for method in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods:
        rule = rule_for(f"/expertmesh.v1.AdminService/{method.name}")
        assert (rule.scope, rule.writes) == (("admin", True) if method.name in writes else ("read", False)), method.name
    assert rule_for("/expertmesh.v1.GenerationService/Generate").scope == "generate"
    assert rule_for("/somebody.Else/Does").scope == "admin"
    assert rule_for("/expertmesh.v1.AttentionService/Link").roles == frozenset({"router"})
    assert rule_for("/grpc.health.v1.Health/Check").scope is None


def test_audit_events_are_one_line_each_and_bounded(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, "balancer", clock)
    request = admin_pb2.ApplyRequest(view_number=3, slot_servers=["a", "b"], fingerprint="x\n{}\x1b[31m" + "y" * 999)
    audit.did({"key": "ops", "peer": "ipv4:1.2.3.4:5"}, "/expertmesh.v1.AdminService/Apply", "OK", request)
    for _ in range(150):
        audit.denied({"peer": "p"}, "/x\n/y", "UNAUTHENTICATED", "no\nkey")
    clock.now_s += 1.0
    audit.denied({"peer": "p"}, "/x", "UNAUTHENTICATED", "no")
    audit.close()
    text = path.read_text()
    assert text.isascii()
    assert "\x1b" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 102
    assert lines[0]["request"]["view_number"] == 3
    assert lines[0]["request"]["slot_servers"] == "2 entries"
    assert len(lines[0]["request"]["fingerprint"]) == 256
    assert lines[-1]["suppressed_before"] == 50


def test_without_a_file_audit_events_go_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expertmesh.audit")
    AuditLog(None, "router-0").denied({"peer": "p"}, "/m", "PERMISSION_DENIED", "why")
    (record,) = caplog.records
    assert (record.name, json.loads(record.getMessage())["outcome"]) == ("expertmesh.audit", "PERMISSION_DENIED")


def test_keys_do_not_cross_a_network_in_the_clear() -> None:
    def config(host: str, **sections: object) -> MeshConfig:
        data = {"router": {"host": host}, "api": {"keys_file": "keys.json"}}
        return parse_config({name: data.get(name, {}) | sections.get(name, {}) for name in data | sections})  # type: ignore[operator]  # mappings

    for host in ("127.0.0.1", "localhost", "::1"):
        config(host).check_doors()
    for host in ("0.0.0.0", "10.0.0.1", "::"):
        with pytest.raises(UserError, match=r"router\.host: .*without TLS"):
            config(host).check_doors()
    config("0.0.0.0", api={"allow_plaintext": True}).check_doors()
    config("0.0.0.0", api={"cert_file": "c", "key_file": "k"}).check_doors()
    with pytest.raises(UserError, match=r"balancer\.host"):
        config("127.0.0.1", balancer={"host": "0.0.0.0"}).check_doors()
    with pytest.raises(UserError, match=r"router\.http\.host"):
        parse_config({"router": {"http": {"host": "0.0.0.0"}}, "api": {"keys_file": "k"}}).check_doors()


def test_each_service_has_files_of_its_own() -> None:
    tls = TlsConfig(cert_file=Path("tls/{role}/{id}.pem"), key_file=Path("tls/{id}.key"), ca_file=Path("ca.pem"))
    own = tls.for_service("expert", "expert-3")
    assert (own.cert_file, own.key_file, own.ca_file) == (
        Path("tls/expert/expert-3.pem"),
        Path("tls/expert-3.key"),
        Path("ca.pem"),
    )


def test_a_router_is_a_guest_under_its_own_certificate_and_nobody_else_is_one() -> None:
    tls = TlsConfig()
    router = identity_of(["router.mesh.expertmesh", "router-0.router.mesh.expertmesh"], tls)
    assert router.why_not("router", guest_id("router-0", "decode")) == ""
    assert "is for router-0, not for router-1@decode" in router.why_not("router", guest_id("router-1", "decode"))
    assert "not for decode@router-0" in router.why_not("router", "decode@router-0")
    expert = identity_of(["expert.mesh.expertmesh", "expert-0.expert.mesh.expertmesh"], tls)
    assert "not for expert-0@decode" in expert.why_not("expert", guest_id("expert-0", "decode"))


@pytest.mark.parametrize("field", ["server_id", "incarnation", "node", "grpc_address", "rank_address", "fingerprint"])
def test_names_that_would_forge_a_line_are_no_registration(field: str) -> None:
    good = registration("e1")
    assert find_mistake(good) is None
    for value in ("x\nINFO forged", "x\r", "\x1b[2J", "y" * 300):
        bad = mesh_pb2.Registration()
        bad.CopyFrom(good)
        setattr(bad, field, value)
        assert field in (find_mistake(bad) or "")


def test_a_log_line_that_quotes_a_client_is_one_line_and_steers_no_terminal() -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "said %s", ("a\r\nINFO forged\x1b[31m\x9b",), None)
    lines = TextFormatter("router-0").format(record).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("  ")
    assert all(line.isprintable() for line in lines)


def test_the_folder_of_a_mesh_is_its_users_alone(tmp_path: Path) -> None:
    state = StateDir.claim(tmp_path / "some" / "mesh")
    try:
        assert state.path.stat().st_mode & 0o077 == 0
    finally:
        state.release()


def test_a_command_sends_its_key_over_no_network_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, secure, behind = TlsConfig(), TlsConfig(ca_file=Path("ca.pem")), ApiConfig(allow_plaintext=True)
    monkeypatch.delenv("EXPERTMESH_API_KEY_FILE", raising=False)
    monkeypatch.delenv("EXPERTMESH_API_KEY", raising=False)
    assert key_for("router:1", plain, ApiConfig()) is None
    monkeypatch.setenv("EXPERTMESH_API_KEY", "emk.a.b")
    for address, tls, api in (
        ("127.0.0.1:1", plain, ApiConfig()),
        ("[::1]:1", plain, ApiConfig()),
        ("router:1", secure, ApiConfig()),
        ("router:1", plain, behind),
    ):
        assert key_for(address, tls, api) == "emk.a.b"
    with pytest.raises(UserError, match=r"EXPERTMESH_API_KEY: would travel to router:1 without TLS.*--config"):
        key_for("router:1", plain, ApiConfig())
