"""Builds the data plane of a view on this rank."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import cast

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

from expertmesh.mesh.config import DataPlaneConfig
from expertmesh.mesh.dataplane.collective import CollectivePlane, PlaneShape, PointToPoint, Work
from expertmesh.mesh.dataplane.sockets import SocketGroup
from expertmesh.mesh.errors import DataPlaneError
from expertmesh.mesh.view import ViewInfo

log = logging.getLogger(__name__)


def uses_links(config: DataPlaneConfig) -> bool:
    """Whether the data plane runs over the ranks' own links."""
    return config.backend in ("auto", "tcp")


def open_dataplane(
    config: DataPlaneConfig, view: ViewInfo, shape: PlaneShape, links: Mapping[int, socket.socket]
) -> CollectivePlane:
    """The data plane of a view, once its ranks have met.

    Args:
        links: to the ranks that this one exchanges tokens with; used when ``uses_links``.

    Raises:
        DataPlaneError: with gloo, the rendezvous store or a rank could not be reached in time.
    """
    group: PointToPoint
    if uses_links(config):
        group = SocketGroup(links, timeout_s=config.timeout_s)
    elif view.size == 1:
        group = _Alone()
    else:
        group = _gloo_group(config, view)
    return CollectivePlane(group, shape, timeout_s=config.timeout_s)


def _gloo_group(config: DataPlaneConfig, view: ViewInfo) -> PointToPoint:
    """Blocks until all ranks have come; having met, they are alive."""
    started = time.monotonic()
    timeout = timedelta(seconds=config.timeout_s)
    host, _, port = view.proto.store_address.rpartition(":")
    try:
        store = TCPStore(host.strip("[]"), int(port), is_master=False, timeout=timeout, wait_for_workers=False)
        group = connect_gloo(PrefixStore(f"view/{view.number}/", store), view.rank, view.size, config)
    except RuntimeError as error:  # torch.distributed's errors derive from it
        raise DataPlaneError(f"view {view.number}: the group could not be built: {error}") from error
    log.info("view %d: gloo group of %d ranks in %.0f ms", view.number, view.size, 1e3 * (time.monotonic() - started))
    return group


def connect_gloo(store: Store, rank: int, size: int, config: DataPlaneConfig) -> PointToPoint:
    """A gloo group over the configured interface. Blocks until all ranks have come.

    Raises:
        RuntimeError: the store or a rank could not be reached in time.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stub calls it Options
    options._devices = [ProcessGroupGloo.create_device(hostname=config.interface_host)]
    options._timeout = timedelta(seconds=config.timeout_s)
    return cast(PointToPoint, ProcessGroupGloo(store, rank, size, options))


class _Alone:
    """The group of a view with one rank: nothing is ever sent."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work:
        raise AssertionError("a rank on its own sends nothing")

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work:
        raise AssertionError("a rank on its own receives nothing")
