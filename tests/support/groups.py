"""Groups whose ranks are threads of the test process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

from torch.distributed import HashStore, ProcessGroupGloo  # type: ignore[attr-defined]  # not in torch's __all__

from expertmesh.mesh.dataplane.sockets import SocketGroup
from expertmesh.mesh.dataplane.transfers import PointToPoint


@contextmanager
def gloo_group(size: int) -> Iterator[list[PointToPoint]]:
    """The group's ``size`` ranks, connected over loopback."""
    store = HashStore()

    def join(rank: int) -> ProcessGroupGloo:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stub calls it Options
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=10)
        return ProcessGroupGloo(store, rank, size, options)

    with ThreadPoolExecutor(size) as pool:
        groups = list(pool.map(join, range(size)))
    yield cast(list[PointToPoint], groups)


@contextmanager
def socket_group(size: int, timeout_s: float = 5.0) -> Iterator[list[PointToPoint]]:
    """The same over the ranks' own links."""
    links: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        for low in range(size):
            for high in range(low + 1, size):
                links[high][low] = socket.create_connection(server.getsockname())
                links[low][high] = server.accept()[0]
    try:
        yield [SocketGroup(own, timeout_s=timeout_s) for own in links]
    finally:
        for own in links:
            for sock in own.values():
                sock.close()


GROUPS = {"gloo": gloo_group, "tcp": socket_group}


def side_links(size: int) -> list[dict[int, socket.socket]]:
    """Of ``size`` expert ranks, each linked to every other one."""
    links: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for low in range(size):
        for high in range(low + 1, size):
            links[low][high], links[high][low] = socket.socketpair()
    return links
