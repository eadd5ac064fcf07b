"""How the ranks of a view find one another: authenticated TCP links between those that have something to say.

Of two ranks the one with the higher number calls. Every link begins with a ``RankHello`` that proves that the caller
knows the view's secret, so that neither strangers nor ranks of an older view get in. The secret itself is not sent: who
overhears a proof can use it for that very link alone, which is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from expertmesh.mesh.errors import DataPlaneError, UserError
from expertmesh.mesh.framing import MAX_MESSAGE_BYTES, Link, Waker
from expertmesh.mesh.view import HOSTS_ATTENTION, HOSTS_EXPERTS, ViewInfo
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

Key = tuple["mesh_pb2.LinkKind.ValueType", int]

# Who has called and said nothing yet: beyond so many the oldest is let go, since ranks speak at once.
_MAX_GREETING = 256
_MAX_HELLO_BYTES = 256


@dataclass
class Links:
    """A rank's links in one view, by the peer's rank."""

    lockstep: dict[int, Link] = field(default_factory=dict)
    data: dict[int, socket.socket] = field(default_factory=dict)
    side: dict[int, socket.socket] = field(default_factory=dict)

    def add(self, kind: mesh_pb2.LinkKind.ValueType, link: Link) -> None:
        if kind == mesh_pb2.LINK_KIND_LOCKSTEP:
            self.lockstep[link.rank] = link
        elif kind == mesh_pb2.LINK_KIND_DATA:
            self.data[link.rank] = link.sock
        else:
            self.side[link.rank] = link.sock

    def hand_over_side(self) -> dict[int, socket.socket]:
        """The side links, which from now on another thread closes."""
        side, self.side = self.side, {}
        return side

    def abandon(self) -> None:
        """End every wait on these links at once; from any thread."""
        for sock in (*(link.sock for link in self.lockstep.values()), *self.data.values()):
            with contextlib.suppress(OSError):  # the peer was faster
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for link in self.lockstep.values():
            link.close()
        for sock in (*self.data.values(), *self.side.values()):
            sock.close()


def bind_listener(host: str, port: int = 0) -> socket.socket:
    """The socket where the other ranks call this process, for as long as it lives.

    Args:
        port: 0 = any free port.

    Raises:
        UserError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            "dataplane.port",
            f"{port} on {host} cannot be bound ({error.strerror})",
            "choose a free port (0 = any) on an address of this machine (dataplane.interface_host)",
        ) from None
    listener.setblocking(False)
    return listener


def wanted_links(view: ViewInfo, *, with_data: bool) -> Iterator[Key]:
    """(kind, peer) of each link that this rank has in the view: with the leader, between the two halves, and between
    expert ranks."""
    own = view.proto.ranks[view.rank]
    for peer in view.proto.ranks:
        if peer.rank == view.rank:
            continue
        if 0 in (peer.rank, view.rank):
            yield mesh_pb2.LINK_KIND_LOCKSTEP, peer.rank
        sends = own.role in HOSTS_ATTENTION and peer.role in HOSTS_EXPERTS
        receives = own.role in HOSTS_EXPERTS and peer.role in HOSTS_ATTENTION
        if with_data and (sends or receives):
            yield mesh_pb2.LINK_KIND_DATA, peer.rank
        if own.role in HOSTS_EXPERTS and peer.role in HOSTS_EXPERTS:
            yield mesh_pb2.LINK_KIND_SIDE, peer.rank


def meet(
    view: ViewInfo,
    listener: socket.socket,
    waker: Waker,
    *,
    timeout_s: float,
    with_data: bool,
    superseded: Callable[[], bool],
) -> Links:
    """Link this rank with its peers of the view.

    Args:
        with_data: link up for the data plane too.
        superseded: says that a newer view is known, so that waiting for this one makes no sense.

    Raises:
        DataPlaneError: not all peers came in time, or the view is superseded.
    """
    deadline = time.monotonic() + timeout_s
    links = Links()
    wanted = list(wanted_links(view, with_data=with_data))
    try:
        for kind, peer in wanted:
            if peer < view.rank:
                links.add(kind, _call(view, kind, peer, deadline))
        expected = {key for key in wanted if key[1] > view.rank}
        for kind, link in _answer(view, listener, waker, expected, deadline, superseded):
            links.add(kind, link)
    except BaseException:
        links.close()
        raise
    return links


def _call(view: ViewInfo, kind: mesh_pb2.LinkKind.ValueType, peer: int, deadline: float) -> Link:
    host, _, port = view.proto.ranks[peer].rank_address.rpartition(":")
    proof = prove(view.proto.secret, view.number, kind, caller=view.rank, called=peer)
    hello = mesh_pb2.RankHello(view_number=view.number, rank=view.rank, secret=proof, kind=kind)
    try:
        left = max(0.001, deadline - time.monotonic())
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
    except OSError as error:
        # A rank's listener lives as long as its process: refusal means that the process is gone.
        raise DataPlaneError(f"view {view.number}: rank {peer} at {host}:{port} is gone: {error}", (peer,)) from error
    sock.settimeout(None)
    link = Link(sock, peer)
    link.send(hello.SerializeToString())
    return link


def prove(secret: bytes, view_number: int, kind: mesh_pb2.LinkKind.ValueType, *, caller: int, called: int) -> bytes:
    """That the caller knows the view's secret, for this link and no other."""
    return hmac.digest(secret, f"{view_number}/{kind}/{caller}/{called}".encode(), hashlib.sha256)


def _answer(
    view: ViewInfo,
    listener: socket.socket,
    waker: Waker,
    expected: set[Key],
    deadline: float,
    superseded: Callable[[], bool],
) -> Iterator[tuple[mesh_pb2.LinkKind.ValueType, Link]]:
    """Accept calls until all that are expected have come."""
    missing = set(expected)
    greeting: dict[socket.socket, Link] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(waker, selectors.EVENT_READ)
        try:
            while missing:
                left = deadline - time.monotonic()
                if left <= 0 or superseded():
                    peers = tuple(sorted({peer for _, peer in missing}))
                    why = "a newer view is known" if left > 0 else "time is up"
                    raise DataPlaneError(f"view {view.number}: ranks {list(peers)} did not link up; {why}", peers)
                for key, _ in selector.select(left):
                    if key.fileobj is listener:
                        sock, _ = listener.accept()
                        if len(greeting) >= _MAX_GREETING:
                            oldest = greeting.pop(next(iter(greeting)))
                            selector.unregister(oldest.sock)
                            oldest.close()
                        greeting[sock] = Link(sock, rank=-1, max_message_bytes=_MAX_HELLO_BYTES)
                        selector.register(sock, selectors.EVENT_READ)
                    elif key.fileobj is waker:
                        waker.clear()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        link = greeting[key.fileobj]
                        greeted, kind = _greet(view, link)
                        if not greeted:
                            continue
                        selector.unregister(link.sock)
                        del greeting[link.sock]
                        if (kind, link.rank) in missing:
                            link.max_message_bytes = MAX_MESSAGE_BYTES
                            missing.remove((kind, link.rank))
                            yield kind, link
                        else:
                            link.close()
        finally:
            for link in greeting.values():
                link.close()


def _greet(view: ViewInfo, link: Link) -> tuple[bool, mesh_pb2.LinkKind.ValueType]:
    """Whether the hello is over, and the kind of link; ``link.rank`` is set when the caller belongs to the view."""
    try:
        for payload in link.receive():
            hello = mesh_pb2.RankHello.FromString(payload)
            expected = prove(view.proto.secret, hello.view_number, hello.kind, caller=hello.rank, called=view.rank)
            if hello.view_number == view.number and hmac.compare_digest(hello.secret, expected):
                link.rank = hello.rank
            else:
                log.info("view %d: refused a link for view %d", view.number, hello.view_number)
            return True, hello.kind
    except (DataPlaneError, DecodeError) as error:
        log.info("view %d: a link ended before its hello: %s", view.number, error)
        return True, mesh_pb2.LINK_KIND_UNSPECIFIED
    return False, mesh_pb2.LINK_KIND_UNSPECIFIED
