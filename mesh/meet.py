"""How the ranks of a view find one another: authenticated TCP links between those that have something to say.

Of two ranks the one with the higher number calls. Every link begins with a ``RankHello`` that proves that the caller
knows the view's secret, so that neither strangers nor ranks of an older view get in. The secret itself is not sent: who
overhears a proof can use it for that very link alone, which is taken. With certificates the link is TLS before anything
is said, and each side looks whether the other one's is that of the server which has this rank in the view.
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
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.message import DecodeError

from expertmesh.mesh.errors import DataPlaneError, UserError
from expertmesh.mesh.framing import MAX_MESSAGE_BYTES, Link, Waker
from expertmesh.mesh.secure_stream import SecureStream, Stream
from expertmesh.mesh.view import HOSTS_ATTENTION, HOSTS_EXPERTS, ViewInfo
from expertmesh.v1 import mesh_pb2

if TYPE_CHECKING:  # the planes of a GPU are measured where pydantic is missing
    from expertmesh.mesh.rank_security import RankSecurity

log = logging.getLogger(__name__)

Kind: TypeAlias = "mesh_pb2.LinkKind.ValueType"
Key: TypeAlias = tuple[Kind, int]

# Who has called and said nothing yet: beyond so many the oldest is let go, since ranks speak at once.
_MAX_GREETING = 256
_MAX_HELLO_BYTES = 256


@dataclass
class Links:
    """A rank's links in one view, by the peer's rank."""

    lockstep: dict[int, Link] = field(default_factory=dict)
    data: dict[int, Stream] = field(default_factory=dict)
    side: dict[int, Stream] = field(default_factory=dict)

    def add(self, kind: Kind, link: Link) -> None:
        if kind == mesh_pb2.LINK_KIND_LOCKSTEP:
            self.lockstep[link.rank] = link
        elif kind == mesh_pb2.LINK_KIND_DATA:
            self.data[link.rank] = link.sock
        else:
            self.side[link.rank] = link.sock

    def hand_over_side(self) -> dict[int, Stream]:
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
    security: RankSecurity | None = None,
) -> Links:
    """Link this rank with its peers of the view.

    Args:
        with_data: link up for the data plane too.
        superseded: says that a newer view is known, so that waiting for this one makes no sense.
        security: None = in the clear.

    Raises:
        DataPlaneError: not all peers came in time, one is not who the view says, or the view is superseded.
    """
    deadline = time.monotonic() + timeout_s
    if security is not None:
        security.refresh()
    meeting = _Meeting(view, listener, security)
    try:
        for kind, peer in wanted_links(view, with_data=with_data):
            if peer < view.rank:
                meeting.call(kind, peer, deadline)
            else:
                meeting.expect(kind, peer)
        meeting.run(waker, deadline, superseded)
    except BaseException:
        meeting.links.close()
        raise
    finally:
        meeting.close()
    return meeting.links


def prove(secret: bytes, view_number: int, kind: Kind, *, caller: int, called: int) -> bytes:
    """That the caller knows the view's secret, for this link and no other."""
    return hmac.digest(secret, f"{view_number}/{kind}/{caller}/{called}".encode(), hashlib.sha256)


class _Meeting:
    """The links of a view while they come about."""

    def __init__(self, view: ViewInfo, listener: socket.socket, security: RankSecurity | None) -> None:
        self.links = Links()
        self._view = view
        self._listener = listener
        self._security = security
        self._missing: set[Key] = set()
        self._calls: dict[Stream, tuple[Kind, Link]] = {}  # ours, which shake hands
        self._greeting: dict[Stream, Link] = {}  # of callers who have not said who they are
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        """What has not become a link ends."""
        self._selector.close()
        for link in (*self._greeting.values(), *(link for _, link in self._calls.values())):
            link.close()

    def expect(self, kind: Kind, peer: int) -> None:
        self._missing.add((kind, peer))

    def call(self, kind: Kind, peer: int, deadline: float) -> None:
        """
        Raises:
            DataPlaneError: nobody is there.
        """
        self._missing.add((kind, peer))
        host, _, port = self._view.proto.ranks[peer].rank_address.rpartition(":")
        try:
            left = max(0.001, deadline - time.monotonic())
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
        except OSError as error:
            # A rank's listener lives as long as its process: refusal means that the process is gone.
            what = f"view {self._view.number}: rank {peer} at {host}:{port} is gone: {error}"
            raise DataPlaneError(what, (peer,)) from error
        sock.settimeout(None)
        if self._security is None:
            self._introduce(kind, Link(sock, peer))
            return
        stream = self._security.stream(sock, is_caller=True)
        self._calls[stream] = kind, Link(stream, peer)
        self._selector.register(stream, selectors.EVENT_READ)
        self._shake(stream, peer)

    def run(self, waker: Waker, deadline: float, superseded: Callable[[], bool]) -> None:
        """Until nobody is missing."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(waker, selectors.EVENT_READ)
        while self._missing:
            left = deadline - time.monotonic()
            if left <= 0 or superseded():
                peers = tuple(sorted({peer for _, peer in self._missing}))
                why = "a newer view is known" if left > 0 else "time is up"
                raise DataPlaneError(f"view {self._view.number}: ranks {list(peers)} did not link up; {why}", peers)
            for key, _ in self._selector.select(left):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is waker:
                    waker.clear()
                else:
                    assert isinstance(key.fileobj, socket.socket | SecureStream)
                    self._go_on(key.fileobj)

    def _go_on(self, stream: Stream) -> None:
        if isinstance(stream, SecureStream) and stream in self._calls:
            self._secure(stream, *self._calls[stream])
        elif stream in self._greeting:  # and was not let go a moment ago
            self._greet(stream, self._greeting[stream])

    def _secure(self, stream: SecureStream, kind: Kind, link: Link) -> None:
        """One step of a handshake of ours."""
        if not self._shake(stream, link.rank, has_arrived=True):
            return
        if problem := self._why_not(stream, link.rank):
            raise DataPlaneError(f"view {self._view.number}: who answers for rank {link.rank}: {problem}", (link.rank,))
        self._selector.unregister(stream)
        del self._calls[stream]
        self._introduce(kind, link)

    def _shake(self, stream: SecureStream, peer: int, *, has_arrived: bool = False) -> bool:
        try:
            if has_arrived:
                stream.feed()
            return stream.shake()
        except OSError as error:
            what = f"rank {peer} ended the handshake of TLS ({error}): dataplane.tls and the authority have to be"
            raise DataPlaneError(f"view {self._view.number}: {what} the same on all ranks", (peer,)) from error

    def _introduce(self, kind: Kind, link: Link) -> None:
        """Say who calls."""
        view = self._view
        proof = prove(view.proto.secret, view.number, kind, caller=view.rank, called=link.rank)
        hello = mesh_pb2.RankHello(view_number=view.number, rank=view.rank, secret=proof, kind=kind)
        self.links.add(kind, link)
        self._missing.remove((kind, link.rank))
        link.send(hello.SerializeToString())

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if len(self._greeting) >= _MAX_GREETING:
            self._forget(next(iter(self._greeting))).close()
        stream = sock if self._security is None else self._security.stream(sock, is_caller=False)
        self._greeting[stream] = Link(stream, rank=-1, max_message_bytes=_MAX_HELLO_BYTES)
        self._selector.register(stream, selectors.EVENT_READ)

    def _forget(self, stream: Stream) -> Link:
        self._selector.unregister(stream)
        return self._greeting.pop(stream)

    def _greet(self, stream: Stream, link: Link) -> None:
        said, kind = self._hello(link)
        if not said:
            return
        self._forget(stream)
        key = (kind, link.rank)
        problem = self._why_not(stream, link.rank) if key in self._missing else "it is not expected"
        if problem:
            log.info("view %d: refused a link of rank %d: %s", self._view.number, link.rank, problem)
            link.close()
            return
        link.max_message_bytes = MAX_MESSAGE_BYTES
        self._missing.remove(key)
        self.links.add(kind, link)

    def _hello(self, link: Link) -> tuple[bool, Kind]:
        """Whether the hello is over, and the kind of link; ``link.rank`` is set when the caller belongs to the view."""
        view = self._view
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

    def _why_not(self, stream: Stream, peer: int) -> str:
        """Why the other end is not that rank of the view; '' when it is, or when certificates do not say."""
        if self._security is None:
            return ""
        assert isinstance(stream, SecureStream)
        rank = self._view.proto.ranks[peer]
        role = mesh_pb2.Role.Name(rank.role).removeprefix("ROLE_").lower()
        return self._security.why_not(stream.peer_certificate(), role, rank.server_id)
