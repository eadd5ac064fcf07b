"""What slots may be asked to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertmesh.mesh.model.spec import ModelSpec

EMPTY = -1


def check_placement(spec: ModelSpec, num_slots: int, placement: Mapping[int, Sequence[int]]) -> None:
    """
    Raises:
        ValueError: the placement, layer → expert of each slot, is not one for this model and so many slots.
    """
    if sorted(placement) != list(spec.moe_layers):
        raise ValueError(f"placement is for layers {sorted(placement)}, the model has {list(spec.moe_layers)}")
    for layer, experts in placement.items():
        if len(experts) != num_slots:
            raise ValueError(f"placement of layer {layer} fills {len(experts)} slots, there are {num_slots}")
        if not all(EMPTY <= expert < spec.num_experts for expert in experts):
            raise ValueError(f"placement of layer {layer} names an expert outside 0..{spec.num_experts - 1}")
