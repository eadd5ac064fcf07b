"""Placement files: the tables of all layers as JSON, with what they were made for.

    {"format": 1, "model": "demo", "fingerprint": "...", "num_experts": 32, "view": 3,
     "servers": ["expert-0", "expert-0", "expert-1", ...],           server of each global slot
     "layers": [{"layer": 0, "version": 4, "slots": [5, -1, ...]}, ...]}

``version`` is the one that the layer's placement replaces; ``view`` and ``version`` matter to `balancer apply` only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertmesh.balancer.placement_rules import PlacementError, check_experts
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import mesh_pb2

FORMAT = 1
_REMEDY = "write it with `expertmesh balancer plan --out FILE`"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Layer(_Part):
    layer: int = Field(ge=0, lt=2**32)
    version: int = Field(0, ge=0)
    slots: list[int]


class _File(_Part):
    format: int
    model: str
    fingerprint: str
    num_experts: int = Field(ge=1)
    view: int = Field(0, ge=0)
    servers: list[str]
    layers: list[_Layer] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementFile:
    """``layers`` use the numbering of ``slot_servers``: global slot → server id. ``view_number`` 0 = of no view."""

    source: str
    model: str
    fingerprint: str
    num_experts: int
    view_number: int
    slot_servers: tuple[str, ...]
    layers: tuple[mesh_pb2.LayerPlacement, ...]

    def mismatch(self, model: mesh_pb2.ModelShape, fingerprint: str) -> str | None:
        """Why the file is not for this model; None when it is."""
        if self.num_experts != model.num_experts:
            return f"{self.source} was made for {self.num_experts} experts a layer, this model has {model.num_experts}"
        if self.fingerprint != fingerprint:
            return (
                f"{self.source} was made for the model {self.model} with the fingerprint {self.fingerprint}, "
                f"this mesh runs {model.name} with {fingerprint}"
            )
        own, wanted = {layer.layer for layer in self.layers}, set(model.moe_layers)
        if own - wanted:
            return f"{self.source} places layer {min(own - wanted)}, which is no MoE layer of {model.name}"
        return None


def read_placement_file(path: Path) -> PlacementFile:
    """
    Raises:
        UserError: it cannot be read, is no placement file, or a layer's table is wrong by itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give the path of a placement file") from None
    try:
        made = _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(str(path), f"is no placement file: {where}: {first['msg']}", _REMEDY) from None
    if made.format != FORMAT:
        raise UserError(str(path), f"has format {made.format}, this version reads {FORMAT}", _REMEDY)
    layers = tuple(_placement(path, layer, made) for layer in made.layers)
    if len({layer.layer for layer in layers}) < len(layers):
        raise UserError(str(path), "places a layer twice", "keep one table a layer")
    return PlacementFile(
        source=str(path),
        model=made.model,
        fingerprint=made.fingerprint,
        num_experts=made.num_experts,
        view_number=made.view,
        slot_servers=tuple(made.servers),
        layers=layers,
    )


def _placement(path: Path, layer: _Layer, made: _File) -> mesh_pb2.LayerPlacement:
    limit = 2**31
    if any(not -limit <= expert < limit for expert in layer.slots):
        raise UserError(str(path), f"layer {layer.layer}: an expert id is out of range", _REMEDY)
    placement = mesh_pb2.LayerPlacement(layer=layer.layer, version=layer.version, slots=layer.slots)
    try:
        check_experts(placement, made.servers, made.num_experts)
    except PlacementError as error:
        raise UserError(str(path), str(error), "mend the table") from None
    return placement


def write_placement_file(path: Path, file: PlacementFile) -> None:
    """
    Raises:
        UserError: the file cannot be written.
    """
    data = {
        "format": FORMAT,
        "model": file.model,
        "fingerprint": file.fingerprint,
        "num_experts": file.num_experts,
        "view": file.view_number,
        "servers": list(file.slot_servers),
        "layers": [
            {"layer": layer.layer, "version": layer.version, "slots": list(layer.slots)} for layer in file.layers
        ],
    }
    try:
        path.write_text(json.dumps(data) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(str(path), f"cannot be written ({error.strerror})", "name a path that can be written") from None
