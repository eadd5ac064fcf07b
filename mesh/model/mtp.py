"""The layer of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2) that follows a model's last one.

It is a decoder layer with experts, so the mesh serves it as one more MoE layer: placement, slots, migrations and
statistics know no difference. What is its own are two norms and a projection before it and a norm behind it; its
embedding and its head are the model's, of which published checkpoints hold copies that are not read.
"""

from __future__ import annotations

from dataclasses import replace

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.families.base import Family, NamedTensor
from expertmesh.mesh.model.fields import Fields

FAMILIES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite")
"""Whose checkpoints may have the layer, all under the same names."""

KEY = "num_nextn_predict_layers"


def with_mtp_layer(family: Family, arch: Architecture, hf_config: Fields) -> Architecture:
    """The architecture with the layer behind its last one; of several such layers the first.

    Raises:
        UserError: the family has none, or config.json says that this checkpoint has none.
    """
    if family.name not in FAMILIES or hf_config.integer(KEY, 0, minimum=0) == 0:
        why = f"{KEY} is 0 or missing in {hf_config.file}" if family.name in FAMILIES else f"it is of {family.name}"
        raise UserError(
            "speculation.method",
            f"is 'mtp', and the model has no layer of multi-token prediction: {why}",
            f"set it to ngram or off, or use a model of {', '.join(FAMILIES)} with {KEY} = 1",
        )
    return replace(arch, mtp_layer=arch.num_layers, moe_layers=(*arch.moe_layers, arch.num_layers))


def mtp_tensors(arch: Architecture) -> dict[str, NamedTensor]:
    """What the layer has beside a decoder layer's tensors, by part: ``embed_norm``, ``hidden_norm``, ``norm`` [H] and
    ``project`` [H, 2H], whose first H columns are the embedding's."""
    assert arch.mtp_layer is not None, "the layer is not served"
    prefix, hidden = f"model.layers.{arch.mtp_layer}", arch.hidden_size
    return {
        "embed_norm": NamedTensor(f"{prefix}.enorm.weight", (hidden,)),
        "hidden_norm": NamedTensor(f"{prefix}.hnorm.weight", (hidden,)),
        "project": NamedTensor(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)),
        "norm": NamedTensor(f"{prefix}.shared_head.norm.weight", (hidden,)),
    }
