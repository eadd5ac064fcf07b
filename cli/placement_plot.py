"""``expertmesh balancer placement --plot``: heat maps of a placement as a PNG.

Dimensions: L layers, G global slots, R expert servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Map:
    title: str
    table: Floats


def plot_placement(path: Path, placement: admin_pb2.GetPlacementResponse, loads: admin_pb2.GetLoadsResponse) -> None:
    """Two heat maps over layers: each slot's load in units of the mean slot's, and each server's in units of the mean
    server's. Without statistics the slots show their experts instead.

    Raises:
        UserError: matplotlib is not installed, there is no placement, or the file cannot be written.
    """
    if not placement.layers:
        raise UserError("--plot", "there is no view, so there is no placement", "wait until the mesh serves")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("--plot", "matplotlib is not installed", "pip install 'expertmesh[plot]'") from None
    slots_LG = np.array([list(layer.slots) for layer in placement.layers])
    servers = list(dict.fromkeys(placement.slot_servers))
    slot_map, server_map = _maps(slots_LG, len(servers), _loads(placement, loads))
    figure = Figure(figsize=(max(8.0, 0.16 * slots_LG.shape[1] + 4), max(3.0, 0.3 * len(slots_LG) + 1.5)))
    slot_axes, server_axes = figure.subplots(1, 2, width_ratios=[3, 1])
    for axes, shown in ((slot_axes, slot_map), (server_axes, server_map)):
        image = axes.imshow(shown.table, aspect="auto", interpolation="nearest", cmap="inferno")
        axes.set_title(shown.title)
        axes.set_yticks(range(len(slots_LG)), [str(layer.layer) for layer in placement.layers])
        figure.colorbar(image, ax=axes)
    width = slots_LG.shape[1] // len(servers)
    for rank in range(1, len(servers)):
        slot_axes.axvline(rank * width - 0.5, color="white", linewidth=1)
    slot_axes.set_xticks([(rank + 0.5) * width - 0.5 for rank in range(len(servers))], servers)
    slot_axes.set_ylabel("layer")
    server_axes.set_xticks(range(len(servers)), servers, rotation=90)
    figure.suptitle(f"view {placement.view_number}")
    figure.set_layout_engine("tight")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError("--plot", f"{path} cannot be written ({error.strerror})", "name another file") from None


def _loads(placement: admin_pb2.GetPlacementResponse, loads: admin_pb2.GetLoadsResponse) -> Floats | None:
    """Load of each expert of the placement's layers; None when nothing was counted."""
    of_layer = {layer.layer: list(layer.load) for layer in loads.layers if layer.tokens > 0}
    if not all(layer.layer in of_layer for layer in placement.layers):
        return None
    return np.array([of_layer[layer.layer] for layer in placement.layers])


def _maps(slots_LG: NDArray[np.int64], num_servers: int, load_LE: Floats | None) -> tuple[_Map, _Map]:
    """By slot and by server."""
    if load_LE is None:
        held_LR = (slots_LG >= 0).reshape(len(slots_LG), num_servers, -1).sum(axis=2).astype(np.float64)
        experts_LG = np.where(slots_LG >= 0, slots_LG, np.nan)
        return _Map(title="expert in each slot", table=experts_LG), _Map(title="experts of each server", table=held_LR)
    load_LG = _slot_loads(slots_LG, load_LE)
    load_LR = np.nansum(load_LG.reshape(len(slots_LG), num_servers, -1), axis=2)
    load_LR /= np.maximum(load_LR.mean(axis=1, keepdims=True), 1e-12)
    return _Map(title="load of each slot / mean", table=load_LG), _Map(title="load / mean", table=load_LR)


def _slot_loads(slots_LG: NDArray[np.int64], load_LE: Floats) -> Floats:
    """Replicas share equally; NaN where a slot is empty."""
    value_LG = np.full(slots_LG.shape, np.nan)
    for row, (slots_G, load_E) in enumerate(zip(slots_LG, load_LE, strict=True)):
        held_G = slots_G >= 0
        replicas_E = np.bincount(slots_G[held_G], minlength=len(load_E))
        value_LG[row, held_G] = load_E[slots_G[held_G]] / replicas_E[slots_G[held_G]]
        value_LG[row] /= max(float(np.nanmean(value_LG[row])), 1e-12)
    return value_LG
