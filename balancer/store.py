"""The rendezvous store of the data plane: torch's TCPStore, served by this process."""

from __future__ import annotations

import asyncio
import logging
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc import join_host_port

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in torch's __all__

log = logging.getLogger(__name__)

_TIMEOUT = timedelta(seconds=30)
_BACKLOG = 1024


class RendezvousStore:
    """Its address is known, and takes connections, before torch is imported: they wait in the socket's backlog.

    TCPStore binds to every interface when it makes its own socket, so it gets one that listens on ``host`` only.

    Raises:
        UserError: ``host`` is not an address of this machine.
    """

    def __init__(self, host: str) -> None:
        try:
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            self._listener: socket.socket | None = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise UserError(
                "dataplane.interface_host",
                f"{host!r} cannot be bound ({error})",
                "name an address of this machine that the other servers reach",
            ) from None
        self._port = self._listener.getsockname()[1]
        self._store: Store | None = None
        self.address = join_host_port(host, self._port)

    async def open(self) -> None:
        """Import torch and start to serve, on a thread: it takes a second or more."""
        await asyncio.to_thread(self._open)
        log.info("rendezvous store on %s", self.address)

    def _open(self) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

        assert self._listener is not None, "opened once"
        fd = self._listener.detach()  # the store closes it
        self._listener = None
        self._store = TCPStore(
            self.address.rpartition(":")[0].strip("[]"),
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=fd,
        )

    def close(self) -> None:
        self._store = None
        if self._listener is not None:
            self._listener.close()
