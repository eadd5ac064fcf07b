"""Links between ranks over TLS: what they carry, what is on the wire, and who does not get in."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from expertmesh.attention_server.server import say_that_nixl_is_clear
from expertmesh.cli.certs import make_certificates
from expertmesh.mesh.config import DataPlaneConfig, TlsConfig, parse_config
from expertmesh.mesh.dataplane.factory import check_secure
from expertmesh.mesh.dataplane.secure_sockets import SecureGroup
from expertmesh.mesh.errors import DataPlaneError, UserError
from expertmesh.mesh.framing import Link, Waker
from expertmesh.mesh.meet import Links, bind_listener, meet, prove
from expertmesh.mesh.rank_security import RankSecurity, rank_security
from expertmesh.mesh.secure_stream import HalfSentError, SecureStream
from expertmesh.mesh.side_transfers import Give, Patience, Take
from expertmesh.mesh.sidegroup import SideGroup
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2
from support.secure_server import tls_as

pytestmark = [pytest.mark.security, pytest.mark.slow]

TIMEOUT_S = 20.0
CPU = torch.device("cpu")
ROLES = (mesh_pb2.ROLE_ATTENTION, mesh_pb2.ROLE_EXPERT, mesh_pb2.ROLE_EXPERT)
IDS = ("attention-0", "expert-0", "expert-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    make_certificates(made, [*IDS, "client"])
    make_certificates(made / "other", IDS)
    return made


def as_(folder: Path, name: str) -> RankSecurity:
    return RankSecurity(tls_as(folder, name))


def secured(sock: socket.socket, security: RankSecurity, *, is_caller: bool) -> SecureStream:
    """After the handshake, which the other end makes at the same time."""
    stream = security.stream(sock, is_caller=is_caller)
    sock.settimeout(TIMEOUT_S)
    while not stream.shake():
        stream.feed()
    sock.settimeout(None)
    return stream


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[SecureStream, SecureStream]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left, right = socket.create_connection(server.getsockname()), server.accept()[0]
    with left, right, ThreadPoolExecutor(1) as pool:
        calling = pool.submit(secured, left, as_(folder, "expert-0"), is_caller=True)
        called = secured(right, as_(folder, "expert-1"), is_caller=False)
        yield calling.result(TIMEOUT_S), called


def test_tokens_cross_both_ways_and_nothing_of_them_is_on_the_wire(pair: tuple[SecureStream, SecureStream]) -> None:
    left, right = pair
    groups = [SecureGroup({1: left}, timeout_s=TIMEOUT_S), SecureGroup({0: right}, timeout_s=TIMEOUT_S)]
    sizes = (0, 1, 5000, 1 << 20)  # the last: more than the kernel buffers, both ways at once
    tensors = [[torch.rand(size) for size in sizes] for _ in groups]

    def exchange(rank: int) -> list[torch.Tensor]:
        group, got = groups[rank], [torch.zeros(size) for size in sizes]
        sent = [group.send([tensor], 1 - rank, tag=i) for i, tensor in enumerate(tensors[rank])]
        for i, tensor in enumerate(got):
            group.recv([tensor], 1 - rank, tag=i).wait(timedelta(seconds=TIMEOUT_S))
        for work in sent:
            work.wait(timedelta(seconds=TIMEOUT_S))
        return got

    with ThreadPoolExecutor(2) as pool:
        received = list(pool.map(exchange, (0, 1)))
    for rank in (0, 1):
        assert all(torch.equal(one, other) for one, other in zip(received[rank], tensors[1 - rank], strict=True))
    marked = torch.frombuffer(bytearray(b"secret activations" * 4), dtype=torch.uint8).clone()
    groups[0].send([marked], 1, tag=9)
    right.raw.settimeout(TIMEOUT_S)
    ciphertext = right.raw.recv(1 << 16)
    assert len(ciphertext) > len(marked)
    assert b"secret" not in ciphertext


def test_a_peer_that_closes_or_is_silent_or_forges_is_an_error(pair: tuple[SecureStream, SecureStream]) -> None:
    left, right = pair
    group = SecureGroup({1: left}, timeout_s=0.2)
    with pytest.raises(DataPlaneError, match="silent"):
        group.recv([torch.zeros(4)], 1, tag=0).wait()
    right.raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody sealed
    with pytest.raises(DataPlaneError, match="failed"):
        group.recv([torch.zeros(4)], 1, tag=0).wait()


def test_a_closed_link_is_an_error(pair: tuple[SecureStream, SecureStream]) -> None:
    left, right = pair
    group = SecureGroup({1: left}, timeout_s=TIMEOUT_S)
    right.close()
    with pytest.raises(DataPlaneError, match="closed"):
        group.recv([torch.zeros(4)], 1, tag=0).wait()


def test_a_send_that_the_kernel_does_not_take_is_finished_by_the_next(pair: tuple[SecureStream, SecureStream]) -> None:
    left, right = pair
    left.setblocking(False)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    payload = memoryview(bytes(range(256)) * (1 << 15))
    with pytest.raises(HalfSentError):
        left.send(payload)
    got, count = bytearray(), 0
    into = memoryview(bytearray(1 << 16))
    right.raw.settimeout(TIMEOUT_S)
    while len(got) < len(payload):
        got += into[: right.recv_into(into)]
        if not count:
            try:
                count = left.send(memoryview(b"x"))
            except HalfSentError:
                continue
    assert (bytes(got), count) == (bytes(payload), len(payload))


def test_weights_cross_one_plan_after_the_other(pair: tuple[SecureStream, SecureStream]) -> None:
    groups = [SideGroup({1: pair[0]}, bytes_per_s=1e9), SideGroup({0: pair[1]}, bytes_per_s=1e9)]
    large = (torch.rand(1 << 20), torch.rand(3))
    second = (torch.rand(1 << 10), torch.rand(3))

    def patience() -> Patience:
        return Patience(threading.Event(), time.monotonic() + TIMEOUT_S)

    def give(plan: int, weights: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
        group, waits = groups[0], patience()
        group.begin(plan, [], [Give(0, 1, weights)], waits)
        left = group.give(waits)
        group.end()
        return left

    with closing(groups[0]), closing(groups[1]), ThreadPoolExecutor(1) as pool:
        for plan, weights in ((1, large), (2, second)):
            giving = pool.submit(give, plan, weights)
            into, waits = (torch.zeros_like(weights[0]), torch.zeros_like(weights[1])), patience()
            groups[1].begin(plan, [Take(0, 0, into)], [], waits)
            assert groups[1].take(waits) == {}
            groups[1].end()
            assert giving.result(TIMEOUT_S) == []
            assert all(torch.equal(one, other) for one, other in zip(into, weights, strict=True))


class Ranks:
    """Three ranks of a view, each with a listener of its own."""

    def __init__(self, stack: ExitStack) -> None:
        self.listeners = [stack.enter_context(bind_listener("127.0.0.1")) for _ in ROLES]
        self.view = mesh_pb2.View(number=7, secret=b"the view's secret")
        for rank, (role, server_id, listener) in enumerate(zip(ROLES, IDS, self.listeners, strict=True)):
            host, port = listener.getsockname()
            self.view.ranks.add(rank=rank, role=role, server_id=server_id, rank_address=f"{host}:{port}")

    def join(self, rank: int, security: RankSecurity | None, timeout_s: float = TIMEOUT_S) -> Links:
        with closing(Waker()) as waker:
            return meet(
                ViewInfo(self.view, rank),
                self.listeners[rank],
                waker,
                timeout_s=timeout_s,
                with_data=True,
                superseded=lambda: False,
                security=security,
            )


def test_ranks_meet_and_strangers_who_know_the_secret_do_not_get_in(folder: Path) -> None:
    """The secret of the view is known to the impostors: it is their certificate that keeps them out."""
    with ExitStack() as stack:
        ranks, pool = Ranks(stack), stack.enter_context(ThreadPoolExecutor(3))
        first = pool.submit(ranks.join, 0, as_(folder, "attention-0"))
        for impostor in (
            None,
            as_(folder / "other", "expert-0"),
            as_(folder, "client"),
            as_(folder, "expert-1"),
            as_(folder, "attention-0"),
        ):
            be_refused(ranks, impostor)
        rest = [pool.submit(ranks.join, rank, as_(folder, IDS[rank])) for rank in (1, 2)]
        met = [joining.result(TIMEOUT_S) for joining in (first, *rest)]
        for links in met:
            stack.callback(links.close)
        assert [sorted(links.lockstep) for links in met] == [[1, 2], [0], [0]]
        assert [sorted(links.data) for links in met] == [[1, 2], [0], [0]]
        assert [sorted(links.side) for links in met] == [[], [2], [1]]
        met[1].lockstep[0].send(b"ready" * 20_000)
        assert b"".join(received(met[0], 1, 100_000)) == b"ready" * 20_000


def be_refused(ranks: Ranks, impostor: RankSecurity | None) -> None:
    """Say to be rank 1, and do not mind who answers, until rank 0 lets go.

    Raises:
        TimeoutError: it does not.
    """
    proof = prove(ranks.view.secret, 7, mesh_pb2.LINK_KIND_LOCKSTEP, caller=1, called=0)
    hello = mesh_pb2.RankHello(view_number=7, rank=1, secret=proof, kind=mesh_pb2.LINK_KIND_LOCKSTEP)
    with socket.create_connection(ranks.listeners[0].getsockname(), timeout=TIMEOUT_S) as sock:
        link = Link(sock, 0)
        if impostor is not None:
            impostor.calling.verify_mode = ssl.CERT_NONE
            link = Link(secured(sock, impostor, is_caller=True), 0)
        with suppress(DataPlaneError, ConnectionError):
            link.send(hello.SerializeToString())
            sock.settimeout(TIMEOUT_S)
            while sock.recv(1 << 16):  # an alert, at most
                pass


def received(links: Links, peer: int, num_bytes: int) -> list[bytes]:
    link, got = links.lockstep[peer], list[bytes]()
    link.sock.settimeout(TIMEOUT_S)
    while sum(map(len, got)) < num_bytes:
        got += link.receive()
    return got


def test_who_answers_for_a_rank_has_its_certificate(folder: Path) -> None:
    """A listener under a rank's address, with the certificate of a neighbour: nothing is said to it."""
    with ExitStack() as stack:
        ranks, pool = Ranks(stack), stack.enter_context(ThreadPoolExecutor(1))
        answering = pool.submit(_answer_as, ranks.listeners[0], as_(folder, "expert-0"))
        with pytest.raises(DataPlaneError, match=r"who answers for rank 0: .*not for attention"):
            ranks.join(1, as_(folder, "expert-1"))
        assert answering.result(TIMEOUT_S) == b""


def _answer_as(listener: socket.socket, security: RankSecurity) -> bytes:
    listener.settimeout(TIMEOUT_S)
    with listener.accept()[0] as sock:
        stream = secured(sock, security, is_caller=False)
        sock.settimeout(TIMEOUT_S)
        try:
            return stream.recv(1 << 16)
        except ConnectionError:
            return b""


def test_new_certificates_are_used_from_the_next_view_on(folder: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path, ["expert-0"])
    security = as_(tmp_path, "expert-0")
    before = security.calling
    security.refresh()
    assert security.calling is before
    (tmp_path / "expert-0.pem").write_text("half-written")
    security.refresh()
    assert security.calling is before
    for name in ("expert-0.pem", "expert-0.key"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    security.refresh()
    assert security.calling is not before


def test_what_dataplane_tls_asks_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    mutual = tls_as(folder, "expert-0")
    one_sided = TlsConfig(cert_file=mutual.cert_file, key_file=mutual.key_file)
    for asked, tls, is_secure in (
        ("auto", TlsConfig(), False),
        ("auto", one_sided, False),
        ("auto", mutual, True),
        ("off", mutual, False),
        (True, mutual, True),
    ):
        config = DataPlaneConfig.model_validate({"tls": asked})
        assert (rank_security(config, tls) is not None) == is_secure, (asked, tls)
    with pytest.raises(UserError, match=r"dataplane\.tls: is on.*tls\.ca_file"):
        rank_security(DataPlaneConfig(tls="on"), one_sided)
    gone = mutual.model_copy(update={"key_file": folder / "nowhere.key"})
    with pytest.raises(UserError, match=r"nowhere\.key"):
        rank_security(DataPlaneConfig(), gone)
    check_secure(DataPlaneConfig(tls="on"), CPU)
    with pytest.raises(UserError, match=r"dataplane\.tls: is on.*gloo travel in the clear"):
        check_secure(DataPlaneConfig(tls="on", backend="gloo"), CPU)
    with pytest.raises(UserError, match=r"dataplane\.tls: is on.*deepep travel in the clear"):
        check_secure(DataPlaneConfig(tls="on", backend="deepep"), torch.device("cuda"))
    with pytest.raises(UserError, match=r"dataplane\.tls: is on, and NIXL moves KV blocks in the clear"):
        say_that_nixl_is_clear(parse_config({"dataplane": {"tls": "on"}}))
    check_secure(DataPlaneConfig(backend="gloo"), CPU)
    assert "activations (dataplane.backend gloo) are not" in caplog.text


def test_only_the_newest_protocol_is_spoken(folder: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    left, right = socket.socketpair()
    with left, right:
        called = as_(folder, "expert-0").stream(right, is_caller=False)
        calling = SecureStream(left, old, is_caller=True)
        assert not calling.shake()
        called.feed()
        with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.protocol"):
            called.shake()
