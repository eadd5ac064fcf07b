"""Opens ``deepep``: looks for the library and what it needs, sets its environment up, makes its buffer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in torch's __all__

from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.deepep import DeepEpPlane, DeepEpSettings, drop, group_order
from expertmesh.mesh.dataplane.deepep_checks import check_machine, check_shape
from expertmesh.mesh.dataplane.nccl_group import NcclGroup, connect_nccl, within
from expertmesh.mesh.errors import DataPlaneError, UserError

log = logging.getLogger(__name__)


def usable(shape: PlaneShape, device: torch.device, nodes: Sequence[str]) -> Path:
    """The NCCL library to use.

    Raises:
        UserError: DeepEP cannot be used, and why.
    """
    check_shape(shape)
    library = check_machine(device, nodes.count(nodes[shape.rank]))
    _set_environment(library, is_one_node=len(set(nodes)) == 1)
    try:
        import deep_ep  # noqa: F401 - its own checks run at import
    except (ImportError, AssertionError, RuntimeError) as error:
        raise UserError(
            "dataplane.backend",
            f"deepep cannot be loaded: {error}",
            "build DeepEP against this torch and this NCCL (docs/gpu.md), or set it to nccl",
        ) from error
    return library


def open_deepep(
    store: Store,
    shape: PlaneShape,
    device: torch.device,
    nodes: Sequence[str],
    settings: DeepEpSettings,
    join_s: float,
    superseded: Callable[[], bool],
) -> DeepEpPlane:
    """The plane of a view; all of its ranks call it.

    Args:
        store: its keys are this plane's alone. nodes: by rank. join_s: how long ranks may take to come.
        superseded: says that a newer view is known, so that waiting for this one makes no sense.

    Raises:
        UserError: DeepEP cannot be used. DataPlaneError: not all ranks came. DeviceLostError: the connections to those
            that did could not be dropped.
    """
    usable(shape, device, nodes)
    order = group_order(shape.expert_ranks, nodes)
    group = connect_nccl(store, order.index(shape.rank), shape.size, device, join_s, superseded)
    is_one_node = len(set(nodes)) == 1
    try:
        buffer = within(
            join_s, device, "making DeepEP's buffer", lambda: _buffer(group, shape, settings, is_one_node), superseded
        )
    except DataPlaneError as error:
        log.warning("%s", error)
        drop(group)  # ends what the thread that stayed behind waits for
        raise
    plane = DeepEpPlane(buffer, group, shape, order, settings)
    try:
        plane.prepare(superseded)
    except DataPlaneError as error:
        log.warning("%s", error)
        plane.close()
        raise
    return plane


def _buffer(group: NcclGroup, shape: PlaneShape, settings: DeepEpSettings, is_one_node: bool) -> Any:
    from deep_ep import ElasticBuffer

    return ElasticBuffer(
        group.group,
        num_max_tokens_per_rank=shape.max_num_tokens,
        hidden=shape.hidden_size,
        num_topk=shape.top_k,
        use_fp8_dispatch=settings.fp8_dispatch,
        allow_hybrid_mode=not is_one_node,
        num_gpu_timeout_secs=settings.kernel_timeout_s,
        explicitly_destroy=True,
    )


def _set_environment(library: Path, *, is_one_node: bool) -> None:
    """What DeepEP reads from the environment, where the user has not set it."""
    if (library.parent.parent / "include" / "nccl_device.h").is_file():
        os.environ.setdefault("EP_NCCL_ROOT_DIR", str(library.parent.parent))
    if is_one_node:  # all traffic is over NVLink, and a machine need not have a network card
        os.environ.setdefault("EP_DISABLE_GIN", "1")
    # Memory of an exchange is held by its event, not by its streams: a graph's pool can use it again within the graph.
    os.environ.setdefault("EP_AVOID_RECORD_STREAM", "1")
