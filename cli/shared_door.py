"""The ports at which all routers of a local mesh listen together, held for as long as the mesh runs.

Linux spreads connections over the sockets that listen at one port with SO_REUSEPORT, each where its hash leads. The
launcher has a socket at the port too that never listens: so the port is known, and nobody else's, before the first
router starts and while any of them starts again.
"""

from __future__ import annotations

import errno
import socket

from expertmesh.mesh.config import RouterConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc import join_host_port


class SharedDoor:
    """The addresses of a gRPC and, where it is on, an HTTP door, which only processes of this user can join.

    Raises:
        UserError: a port is taken, also by another mesh's door, or an address is none of this machine.
    """

    def __init__(self, router: RouterConfig) -> None:
        self._held: list[socket.socket] = []
        try:
            self.address = self._hold(router.host, router.port, "router.port")
            self.http_address = None
            """``host:port``; None where there is no such door."""
            if router.http.enabled:
                self.http_address = self._hold(router.http.host or router.host, router.http.port, "router.http.port")
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        for held in self._held:
            held.close()

    def _hold(self, host: str, port: int, key: str) -> str:
        try:
            held = _bound(host.strip("[]"), port)
        except OSError as error:
            raise UserError(
                key,
                f"{join_host_port(host, port)} cannot be bound ({error})",
                "choose a free port (0 = any) on an address of this machine",
            ) from None
        self._held.append(held)
        return join_host_port(host, int(held.getsockname()[1]))


def _bound(host: str, port: int) -> socket.socket:
    """A socket that others of this user may stand beside from now on, but found nobody there.

    Raises:
        OSError: the address cannot be had.
    """
    try:
        held = _bind(host, port, after_others=False)
    except OSError as error:
        # What a server that is gone left behind (TIME_WAIT) is in the way of who does not ask for SO_REUSEADDR; who
        # does could be beside a socket that does not listen yet. So it is asked for only here: ours never did.
        if error.errno != errno.EADDRINUSE or not port:
            raise
        held = _bind(host, port, after_others=True)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    # Not before it is bound: else it would find a place beside the door of another mesh, whose clients it would get.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return held


def _bind(host: str, port: int, *, after_others: bool) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, kind, proto)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, after_others)
        held.bind(address)
    except OSError:
        held.close()
        raise
    return held
