"""/metrics behind keys and certificates."""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertmesh.mesh.config import ApiConfig, TelemetryConfig, TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry import setup_telemetry
from support.secure_server import TIMEOUT_S, Keys, tls_as
from support.secure_server import authority as authority

pytestmark = [pytest.mark.security, pytest.mark.slow]

METRICS = TelemetryConfig(metrics_port=0)


@contextmanager
def scraped(tls: TlsConfig, api: ApiConfig, config: TelemetryConfig = METRICS) -> Iterator[str]:
    """``host:port`` of a server's /metrics."""
    telemetry = setup_telemetry(config, role="expert", instance="expert-0", tls=tls, api=api)
    try:
        assert telemetry.metrics_address is not None
        yield telemetry.metrics_address
    finally:
        telemetry.shutdown()


def scrape(
    address: str, key: str | None = None, authority: Path | None = None, certificate: TlsConfig | None = None
) -> int:
    """HTTP's status; over TLS where an authority is given."""
    context = None
    if authority is not None:
        context = ssl.create_default_context(cafile=authority)
        if certificate is not None:
            assert certificate.cert_file is not None
            context.load_cert_chain(certificate.cert_file, certificate.key_file)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = f"{'http' if context is None else 'https'}://{address}/metrics"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S, context=context
        ) as answer:
            assert b"expertmesh_build_info" in answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


def test_a_key_of_scope_read_opens_it_and_revoking_closes_it_at_once(tmp_path: Path) -> None:
    keys, audit = Keys(tmp_path / "keys.json"), tmp_path / "audit.jsonl"
    read, generate = keys.add("grafana", "read"), keys.add("app", "generate")
    with scraped(TlsConfig(), ApiConfig(keys_file=keys.path, audit_file=audit)) as address:
        for key, status in ((None, 401), ("emk.grafana.x", 401), (generate, 403), (read, 200)):
            assert scrape(address, key) == status, key
        keys.revoke("grafana")
        assert scrape(address, read) == 401
    assert '"method": "GET /metrics"' in audit.read_text()
    assert read not in audit.read_text()


def test_certificates_open_it_as_they_do_the_admin_api(authority: Path, tmp_path: Path) -> None:
    ca, keys = authority / "ca.pem", Keys(tmp_path / "keys.json")
    read = keys.add("grafana", "read")
    server = tls_as(authority, "expert-0")
    with scraped(server, ApiConfig()) as address:
        with pytest.raises((OSError, urllib.error.URLError)):
            scrape(address)
        with pytest.raises((OSError, urllib.error.URLError)):
            scrape(address, authority=ca)
        for name, status in (("operator", 200), ("client", 200), ("expert-1", 403)):
            assert scrape(address, authority=ca, certificate=tls_as(authority, name)) == status, name
    with scraped(server, ApiConfig(keys_file=keys.path)) as address:
        assert scrape(address, authority=ca) == 401
        assert scrape(address, read, authority=ca) == 200
        for name, key, status in (
            ("operator", None, 200),
            ("client", None, 401),
            ("client", read, 200),
            ("expert-1", read, 403),
        ):
            assert scrape(address, key, authority=ca, certificate=tls_as(authority, name)) == status, name


def test_without_security_and_when_it_is_told_to_it_is_open(authority: Path, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    with scraped(TlsConfig(), ApiConfig()) as address:
        assert scrape(address) == 200
    told = METRICS.model_copy(update={"metrics_access": "open"})
    with scraped(tls_as(authority, "expert-0"), ApiConfig(keys_file=keys.path), told) as address:
        assert scrape(address) == 200


def test_who_says_nothing_holds_nobody_up(authority: Path) -> None:
    with scraped(tls_as(authority, "expert-0"), ApiConfig()) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S):
            operator = tls_as(authority, "operator")
            assert scrape(address, authority=authority / "ca.pem", certificate=operator) == 200


def test_keys_in_the_clear_and_files_that_cannot_be_read_are_refused_at_start(authority: Path, tmp_path: Path) -> None:
    far = METRICS.model_copy(update={"metrics_host": "0.0.0.0"})
    keys = ApiConfig(keys_file=Keys(tmp_path / "keys.json").path)
    with pytest.raises(UserError, match=r"telemetry\.metrics_host: is 0\.0\.0\.0.*without TLS"):
        setup_telemetry(far, role="router", instance="router-0", api=keys)
    gone = TlsConfig(cert_file=tmp_path / "gone.pem", key_file=tmp_path / "gone.key")
    with pytest.raises(UserError, match=r"gone\.pem.*/metrics"):
        setup_telemetry(METRICS, role="router", instance="router-0", tls=gone)
    nowhere = ApiConfig(keys_file=tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"nowhere\.json"):
        setup_telemetry(METRICS, role="router", instance="router-0", api=nowhere)
