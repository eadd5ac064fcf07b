"""Strangers at the listener of a rank while its view meets."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from expertmesh.mesh.framing import Link, Waker
from expertmesh.mesh.meet import Links, bind_listener, meet, prove
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

pytestmark = [pytest.mark.security, pytest.mark.slow]

SECRET = b"the view's secret"
LOCKSTEP = mesh_pb2.LINK_KIND_LOCKSTEP


def view_at(address: str, rank: int) -> ViewInfo:
    view = mesh_pb2.View(number=7, secret=SECRET)
    for number in range(2):
        view.ranks.add(rank=number, rank_address=address)
    return ViewInfo(view, rank)


def hello(**fields: object) -> bytes:
    """Framed as a rank sends it."""
    made = {"view_number": 7, "rank": 1, "kind": LOCKSTEP, **fields}
    payload = mesh_pb2.RankHello(**made).SerializeToString()  # type: ignore[arg-type]  # fields of a message
    return len(payload).to_bytes(4, "little") + payload


def test_strangers_neither_get_in_nor_keep_others_out() -> None:
    listener = bind_listener("127.0.0.1")
    host, port = listener.getsockname()
    overheard = prove(SECRET, 7, LOCKSTEP, caller=1, called=2)  # the link of the same caller to another rank
    attempts = [
        hello(secret=SECRET),
        hello(secret=b""),
        hello(secret=overheard),
        hello(secret=prove(SECRET, 6, LOCKSTEP, caller=1, called=0), view_number=6),
        hello(secret=prove(SECRET, 7, mesh_pb2.LINK_KIND_SIDE, caller=1, called=0)),
        hello(secret=prove(SECRET, 7, LOCKSTEP, caller=5, called=0), rank=5),
        (1 << 20).to_bytes(4, "little") + bytes(1 << 16),  # larger than any hello
        b"\xff" * 64,
    ]

    def join(rank: int) -> Links:
        waker = Waker()
        try:
            view = view_at(f"{host}:{port}", rank)
            return meet(view, listener, waker, timeout_s=20.0, with_data=False, superseded=lambda: False)
        finally:
            waker.close()

    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(join, 0)
        for attempt in attempts:
            stranger = stack.enter_context(socket.create_connection((host, port), timeout=20.0))
            with suppress(ConnectionError):  # it may be let go while it speaks
                stranger.sendall(attempt)
            assert is_let_go(stranger), attempt[:40]
        silent = [stack.enter_context(socket.create_connection((host, port), timeout=20.0)) for _ in range(300)]
        assert is_let_go(silent[0]), "the oldest makes room"
        caller, called = join(1), waiting.result(timeout=20.0)
        stack.callback(caller.close)
        stack.callback(called.close)
        assert list(called.lockstep) == [1]
        caller.lockstep[0].send(b"it is the right one" * 100)
        assert receive(called.lockstep[1]) == b"it is the right one" * 100
    listener.close()


def is_let_go(stranger: socket.socket) -> bool:
    """Whether the rank closes the connection; a time-out is no answer."""
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


def receive(link: Link) -> bytes:
    link.sock.settimeout(20.0)
    ended_s = time.monotonic() + 20.0
    while time.monotonic() < ended_s:
        for payload in link.receive():
            return payload
    raise TimeoutError
