"""Builds the data plane of a view on this rank."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

from expertmesh.mesh.dataplane.base import DataPlane, PlaneShape
from expertmesh.mesh.dataplane.collective import CollectivePlane
from expertmesh.mesh.dataplane.nccl_group import Abort, connect_nccl, within
from expertmesh.mesh.dataplane.secure_sockets import SecureGroup
from expertmesh.mesh.dataplane.sockets import SocketGroup
from expertmesh.mesh.dataplane.transfers import PointToPoint, Work
from expertmesh.mesh.errors import DataPlaneError, UserError
from expertmesh.mesh.secure_stream import SecureStream, Stream
from expertmesh.mesh.view import ViewInfo

if TYPE_CHECKING:  # the planes of a GPU are measured where pydantic is missing
    from expertmesh.mesh.config import DataPlaneConfig

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

Backend = Literal["auto", "deepep", "nccl", "tcp", "gloo"]
ON_DEVICE = ("deepep", "nccl")


def checked_backend(backend: Backend, device: torch.device) -> Backend:
    """``auto`` on a CPU is ``tcp``; on a GPU it stays ``auto`` until all ranks have said whether they can do deepep, or
    is ``local`` where there is one rank only.

    Raises:
        UserError: the backend moves tokens of the other kind of device.
    """
    if device.type == "cuda":
        if backend in ("tcp", "gloo"):
            raise UserError(
                "dataplane.backend", f"{backend} moves tokens between CPUs, and this rank computes on {device}",
                "set it to auto, deepep or nccl",
            )  # fmt: skip
        return backend
    if backend in ON_DEVICE:
        raise UserError(
            "dataplane.backend", f"{backend} moves tokens between GPUs, and this rank computes on the CPU",
            "set it to auto, tcp or gloo",
        )  # fmt: skip
    return "tcp" if backend == "auto" else backend


def uses_links(config: DataPlaneConfig, device: torch.device = CPU) -> bool:
    """Whether the data plane runs over the ranks' own links.

    Raises:
        UserError: the backend moves tokens of the other kind of device.
    """
    return checked_backend(config.backend, device) == "tcp"


def open_dataplane(
    config: DataPlaneConfig,
    view: ViewInfo,
    shape: PlaneShape,
    links: Mapping[int, Stream],
    device: torch.device = CPU,
    *,
    join_s: float = 30.0,
    superseded: Callable[[], bool] = lambda: False,
) -> DataPlane[Any]:
    """The data plane of a view, once its ranks have met.

    Args:
        links: to the ranks that this one exchanges tokens with; used when ``uses_links``.
        device: where this rank computes.
        join_s: how long the ranks of a device plane may take to come.
        superseded: says that a newer view is known, so that waiting for this one makes no sense.

    Raises:
        DataPlaneError: the rendezvous store or a rank could not be reached in time.
        DeviceLostError: the connections to ranks of a device plane that were reached could not be dropped.
        UserError: the backend cannot be used here.
    """
    backend = checked_backend(config.backend, device)
    if backend not in ("tcp", "gloo"):
        if view.size == 1:
            from expertmesh.mesh.dataplane.local import LocalPlane  # its kernels need Triton

            return LocalPlane(shape.slots_per_rank, device)
        nodes = [rank.node for rank in view.proto.ranks]
        return open_on_device(config, _store(config, view), shape, device, nodes, join_s, superseded)
    group: PointToPoint
    if backend == "tcp":
        group = _over(links, config.timeout_s)
    elif view.size == 1:
        group = _Alone()
    else:
        group = _gloo_group(config, view)
    return CollectivePlane(group, shape, timeout_s=config.timeout_s)


def _over(links: Mapping[int, Stream], timeout_s: float) -> SocketGroup:
    """All links are secure, or none."""
    secure = {rank: link for rank, link in links.items() if isinstance(link, SecureStream)}
    if secure:
        return SecureGroup(secure, timeout_s=timeout_s)
    return SocketGroup(
        {rank: link for rank, link in links.items() if isinstance(link, socket.socket)}, timeout_s=timeout_s
    )


def check_secure(config: DataPlaneConfig, device: torch.device) -> None:
    """At the start of a rank whose links are encrypted.

    Raises:
        UserError: all has to be (``dataplane.tls: on``), and the backend sends activations in the clear.
    """
    backend = checked_backend(config.backend, device)
    if backend == "tcp":
        return
    why = "torch's own builds have gloo without TLS" if backend == "gloo" else "between GPUs nothing encrypts"
    if config.tls == "on":
        raise UserError(
            "dataplane.tls",
            f"is on, and activations of dataplane.backend {backend} travel in the clear: {why}",
            "set dataplane.backend: tcp (CPUs), or dataplane.tls: auto and a network that others cannot reach",
        )
    log.warning("steps and weights between ranks are encrypted, activations (dataplane.backend %s) are not", backend)


def open_on_device(
    config: DataPlaneConfig,
    store: Store,
    shape: PlaneShape,
    device: torch.device,
    nodes: list[str],
    join_s: float,
    superseded: Callable[[], bool] = lambda: False,
) -> DataPlane[Any]:
    """``deepep`` or ``nccl`` between the ranks that share a store; see ``open_dataplane``.

    Args:
        store: its keys are this plane's alone. nodes: by rank.
    """
    # Imported here: their kernels need Triton, which is there only where a GPU is.
    from expertmesh.mesh.dataplane.deepep import DeepEpSettings
    from expertmesh.mesh.dataplane.deepep_open import open_deepep
    from expertmesh.mesh.dataplane.nccl import NcclPlane

    if config.backend == "deepep" or (config.backend == "auto" and _all_can_do_deepep(store, shape, device, nodes)):
        settings = DeepEpSettings(config.num_sms, config.fp8_dispatch, config.timeout_s)
        return open_deepep(PrefixStore("deepep/", store), shape, device, nodes, settings, join_s, superseded)
    group = connect_nccl(PrefixStore("nccl/", store), shape.rank, shape.size, device, join_s, superseded)
    plane = NcclPlane(group, shape, device, timeout_s=config.timeout_s)
    try:
        within(join_s, device, "the first exchange over NCCL", plane.connect, superseded)
    except DataPlaneError as error:
        log.warning("%s", error)
        Abort(group.abort).wait()  # ends what the thread that stayed behind waits for
        raise
    return plane


def _all_can_do_deepep(store: Store, shape: PlaneShape, device: torch.device, nodes: list[str]) -> bool:
    """All ranks take the same backend: deepep where every one of them can."""
    from expertmesh.mesh.dataplane.deepep_open import usable

    reason = ""
    try:
        usable(shape, device, nodes)
    except UserError as error:
        reason = str(error)
        log.warning("dataplane.backend auto takes nccl: %s", error)
    try:
        store.set(f"auto/{shape.rank}", reason)
        store.wait([f"auto/{rank}" for rank in range(shape.size)])
        reasons = [store.get(f"auto/{rank}").decode() for rank in range(shape.size)]
    except RuntimeError as error:  # torch.distributed's errors derive from it
        raise DataPlaneError(f"not all ranks said which data plane they can use: {error}") from error
    return not any(reasons)


def _store(config: DataPlaneConfig, view: ViewInfo) -> Store:
    """The rendezvous store under the view's own prefix.

    Raises:
        DataPlaneError: it cannot be reached.
    """
    host, _, port = view.proto.store_address.rpartition(":")
    timeout = timedelta(seconds=config.timeout_s)
    try:
        store = TCPStore(host.strip("[]"), int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:  # torch.distributed's errors derive from it
        raise DataPlaneError(f"view {view.number}: the rendezvous store cannot be reached: {error}") from error
    return PrefixStore(f"view/{view.number}/", store)


def _gloo_group(config: DataPlaneConfig, view: ViewInfo) -> PointToPoint:
    """Blocks until all ranks have come; having met, they are alive."""
    started = time.monotonic()
    store = _store(config, view)
    try:
        group = connect_gloo(store, view.rank, view.size, config)
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
