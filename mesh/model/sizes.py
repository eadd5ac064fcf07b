"""How large a model is, from its config.json alone or with the headers of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.families.base import Family, FusedExpertTensors, NamedTensor, stored_experts
from expertmesh.mesh.model.fields import Fields, read_fields
from expertmesh.mesh.model.quantisation.formats import FP8_BLOCK, MXFP4_GROUP
from expertmesh.mesh.model.quantisation.storage import stored_bytes
from expertmesh.mesh.model.spec import check_tensors, read_architecture
from expertmesh.mesh.model.tensors import TensorIndex, read_tensor_index
from expertmesh.mesh.model.unused import UnusedTensors, find_unused

QUANTIZATION = "quantization_config"
DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """Parameters are counts.

    Args:
        dense_parameters: what an attention server holds: everything but routed experts.
        expert_parameters: of one routed expert.
        has_weights: they are in the folder; else, or where they are not served, what is stored is by config.json.
        stored_expert_bytes: of one expert in the files, its scales included; None for formats that are not known.
        stored_bytes: of the whole model in the files; None for formats that are not known.
        quantization: ``quant_method`` of config.json; None = not quantised.
        not_served: why a mesh would refuse the checkpoint; None = it would not.
        unused: tensors that no part of the model uses; None without weights.
    """

    family: str
    arch: Architecture
    dense_parameters: int
    expert_parameters: int
    has_weights: bool
    stored_expert_bytes: float | None
    stored_bytes: float | None
    quantization: str | None
    not_served: str | None
    unused: UnusedTensors | None

    @property
    def total_parameters(self) -> int:
        return self.dense_parameters + len(self.arch.moe_layers) * self.arch.num_experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """What one token is computed with, LM head and the whole embedding counted."""
        return self.dense_parameters + len(self.arch.moe_layers) * self.arch.top_k * self.expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of which a token reads one row; some publish active parameters without them."""
        return 0 if self.arch.tie_word_embeddings else self.arch.vocab_size * self.arch.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache holds for a token in all layers."""
        return self.arch.num_layers * self.arch.kv_values_per_token


def read_sizes(path: Path) -> ModelSizes:
    """Sizes of a checkpoint folder; without weights its config.json is enough.

    Raises:
        UserError: config.json is missing, wrong or of a family that is not served; or weights are there and damaged,
            incomplete, or of other shapes.
    """
    hf_config = read_fields(path / "config.json")
    # Sizes are known of formats that are not served, too.
    plain = replace(hf_config, data={key: value for key, value in hf_config.data.items() if key != QUANTIZATION})
    family, arch = read_architecture(plain)
    not_served = _why_not_served(hf_config)
    has_weights = _has_weights(path)
    index = read_tensor_index(path) if has_weights and not_served is None else None
    expert, total = _configured_bytes(hf_config, family, arch) if index is None else _held_bytes(family, arch, index)
    quantization = hf_config.section(QUANTIZATION)
    return ModelSizes(
        family=family.name,
        arch=arch,
        dense_parameters=sum(math.prod(named.shape) for part in _dense(family, arch) for named in part.values()),
        expert_parameters=sum(math.prod(shape) for shape in arch.expert_shapes),
        has_weights=has_weights,
        stored_expert_bytes=expert,
        stored_bytes=total,
        quantization=quantization.string("quant_method", "unknown") if quantization.data else None,
        not_served=not_served,
        unused=None if index is None else find_unused(family, arch, index),
    )


def _why_not_served(hf_config: Fields) -> str | None:
    try:
        read_architecture(hf_config)
    except UserError as error:
        return str(error)
    return None


def _has_weights(path: Path) -> bool:
    """An index alone, as a download that was broken off leaves it, is no weights."""
    return any(path.glob("*.safetensors"))


def _dense(family: Family, arch: Architecture) -> Iterable[Mapping[str, NamedTensor]]:
    yield family.model_tensors(arch)
    for layer in range(arch.num_layers):
        yield family.layer_tensors(arch, layer)


def _held_bytes(family: Family, arch: Architecture, index: TensorIndex) -> tuple[float, float]:
    """One expert of the first MoE layer and all tensors of the folder, which must have what the model needs."""
    check_tensors(family, arch, index)
    total = sum(entry.num_bytes for entry in index.entries.values())
    stored = stored_experts(family, arch, arch.moe_layers[0], index.entries.__contains__)
    if isinstance(stored, FusedExpertTensors):
        return sum(stored_bytes(index, named) for named in stored.all) / arch.num_experts, total
    return sum(stored_bytes(index, named) for named in stored[0].all), total


def _configured_bytes(hf_config: Fields, family: Family, arch: Architecture) -> tuple[float | None, float | None]:
    """One expert and the whole model, as config.json says that they are stored; None for an unknown format."""
    plain = DTYPE_BITS.get(str(_text_value(hf_config, "dtype") or _text_value(hf_config, "torch_dtype")))
    if plain is None and hf_config.has(QUANTIZATION):
        plain = DTYPE_BITS["bfloat16"]
    if plain is None:
        return None, None
    dense_bits, expert_bits = float(plain), float(plain)
    match hf_config.section(QUANTIZATION).data.get("quant_method"):
        case None:
            pass
        case "fp8":
            dense_bits = expert_bits = 8 + 32 / FP8_BLOCK**2  # a block has a scale in float32
        case "mxfp4":
            expert_bits = 4 + 8 / MXFP4_GROUP
        case _:
            return None, None
    expert = sum(math.prod(shape) * (expert_bits if len(shape) > 1 else plain) for shape in arch.expert_shapes) / 8
    dense = sum(
        # Linear layers are quantised, and not embeddings, norms and gates.
        math.prod(named.shape) * (dense_bits if name.endswith("_proj") else plain) / 8
        for part in _dense(family, arch)
        for name, named in part.items()
    )
    return expert, dense + expert * arch.num_experts * len(arch.moe_layers)


def _text_value(hf_config: Fields, key: str) -> Any:
    """Of the text model where config.json describes several."""
    return hf_config.data.get(key) or hf_config.section("text_config").data.get(key)
