"""A checkpoint folder as the mesh sees it: sizes, names, generation defaults and a fingerprint.

Reading a spec reads JSON and safetensors headers only and does not import torch.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.demo import DEMO_MODEL_NAME, demo_model_path
from expertmesh.mesh.model.families import find_family
from expertmesh.mesh.model.families.base import Family, FusedExpertTensors, NamedTensor, stored_experts
from expertmesh.mesh.model.fields import Fields, read_fields
from expertmesh.mesh.model.hub import fetch_repo
from expertmesh.mesh.model.mtp import mtp_tensors, with_mtp_layer
from expertmesh.mesh.model.quantisation.storage import find_storage
from expertmesh.mesh.model.tensors import TensorIndex, read_tensor_index

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_GIVE_A_MODEL = "give a Hugging Face checkpoint folder, or ORGANISATION/NAME on its hub (model.repo)"

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MAX_EXPERTS = 2**15 - 1
"""Of a layer: traces keep expert ids as int16."""


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """``generation_config.json``: what a request that says nothing gets. Absent keys change nothing, as in vLLM.

    ``do_sample`` false means greedy, whatever the rest says. ``top_k`` 0 = off.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Architecture):
    """The architecture and what the configuration makes of it.

    ``path`` also holds the tokenizer's files. ``dtype_name`` is what the mesh computes in, not what the file stores.
    ``fingerprint`` is equal on two servers exactly when config.json, the tensors' names, shapes, dtypes and sizes, the
    compute dtype and the layers that are served are; it does not read the weights.
    """

    name: str
    family: str
    path: Path
    dtype_name: Literal["float32", "bfloat16"]
    generation: GenerationDefaults
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype:
        import torch  # imported here: the router reads specs and never computes, and torch costs a second to import

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype_name]

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of one expert's weights in the compute dtype."""
        return sum(math.prod(shape) for shape in self.expert_shapes) * DTYPE_BYTES[self.dtype_name]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache for a token in all layers."""
        return len(self.layers) * self.kv_values_per_token * DTYPE_BYTES[self.dtype_name]


def load_spec(config: ModelConfig, *, mtp: bool = False) -> ModelSpec:
    """Read and check a checkpoint folder; see ``checkpoint_folder`` for which one.

    Every tensor that the architecture needs is looked up in the safetensors headers, so that a server which got its
    spec can read its weights; with ``load_format: dummy`` there need be none.

    Args:
        mtp: the layer of multi-token prediction is served too.

    Raises:
        UserError: config.json, generation_config.json or the weights are missing, damaged, contradictory or of an
            unsupported kind, ``model.max_model_len`` is beyond the checkpoint's, or it has no such layer; the key names
            file, key or tensor.
    """
    path = checkpoint_folder(config)
    hf_config = read_fields(path / "config.json")
    family, arch = read_architecture(hf_config)
    if mtp:
        arch = with_mtp_layer(family, arch, hf_config)
    arch = replace(arch, max_model_len=_max_model_len(config, arch.max_model_len))
    generation = GenerationDefaults()
    if (path / "generation_config.json").exists():
        hf_generation = read_fields(path / "generation_config.json")
        generation = _generation_defaults(hf_generation)
        # As transformers' generate: what generation_config.json says about the end wins over config.json.
        arch = replace(arch, eos_token_ids=hf_generation.integers("eos_token_id") or arch.eos_token_ids)
    index = TensorIndex(path=path, entries={})
    if config.load_format == "auto":
        index = read_tensor_index(path)
        check_tensors(family, arch, index)
    sizes: dict[str, Any] = {field.name: getattr(arch, field.name) for field in fields(arch)}
    return ModelSpec(
        **sizes,
        name=config.name or config.repo or (DEMO_MODEL_NAME if config.path is None else path.name),
        family=family.name,
        path=path,
        dtype_name=config.dtype,
        generation=generation,
        fingerprint=_fingerprint(hf_config.raw, index, config.dtype, has_mtp=mtp),
    )


def checkpoint_folder(config: ModelConfig, *, weights: bool = True) -> Path:
    """The folder of ``config.path``, or that of ``config.repo`` after fetching it; neither = the demo model.

    Args:
        weights: False = of a repository config.json alone.

    Raises:
        UserError: there is no such folder, or the repository cannot be fetched.
    """
    if config.repo is not None:
        return fetch_repo(config.repo, config.revision, weights=weights)
    if config.path is None:
        return demo_model_path()
    try:
        path = config.path.expanduser().resolve()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # the latter for a loop of links and an unknown ~user
        raise UserError("model.path", f"{config.path} cannot be read ({error})", _GIVE_A_MODEL) from None
    if not is_folder:
        raise UserError("model.path", f"{path} is not a folder", _GIVE_A_MODEL)
    return path


def read_architecture(hf_config: Fields) -> tuple[Family, Architecture]:
    """The family and sizes of a config.json.

    Raises:
        UserError: a key is wrong or not supported.
    """
    if hf_config.has("auto_map"):
        log.info("%s: auto_map names code of the checkpoint, which is never run", hf_config.file)
    family = find_family(hf_config)
    arch = family.read(hf_config)
    if arch.num_experts > MAX_EXPERTS:
        raise UserError(hf_config.file, f"has {arch.num_experts} experts a layer", f"{MAX_EXPERTS} are the most")
    return family, arch


def check_tensors(family: Family, arch: Architecture, index: TensorIndex) -> None:
    """Look up every tensor of the architecture.

    Raises:
        UserError: one is missing or has another shape, or a dtype that is not read.
    """
    for tensor in needed_tensors(family, arch, index):
        find_storage(index, tensor)


def needed_tensors(family: Family, arch: Architecture, index: TensorIndex) -> Iterator[NamedTensor]:
    """Every tensor that the mesh reads, experts in the layout that the folder has."""
    yield from family.model_tensors(arch).values()
    for layer in arch.layers:
        yield from family.layer_tensors(arch, layer).values()
    if arch.mtp_layer is not None:
        yield from mtp_tensors(arch).values()
    for layer in arch.moe_layers:
        stored = stored_experts(family, arch, layer, index.entries.__contains__)
        for tensors in (stored,) if isinstance(stored, FusedExpertTensors) else stored:
            yield from tensors.all


def _max_model_len(config: ModelConfig, limit: int) -> int:
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise UserError(
            "model.max_model_len",
            f"{config.max_model_len} is more than the checkpoint's max_position_embeddings {limit}",
            f"set it to {limit} or less, or leave it out",
        )
    return config.max_model_len


def _generation_defaults(generation: Fields) -> GenerationDefaults:
    off = GenerationDefaults()
    top_p = generation.number("top_p", off.top_p)
    if not 0 < top_p <= 1:
        raise generation.error("top_p", f"is {top_p}", "it must be in (0, 1]")
    repetition_penalty = generation.number("repetition_penalty", off.repetition_penalty)
    if repetition_penalty <= 0:
        raise generation.error("repetition_penalty", f"is {repetition_penalty}", "it must be positive")
    return GenerationDefaults(
        do_sample=generation.boolean("do_sample", off.do_sample),
        temperature=generation.number("temperature", off.temperature),
        top_p=top_p,
        top_k=generation.integer("top_k", off.top_k, minimum=0),
        min_p=generation.number("min_p", off.min_p),
        repetition_penalty=repetition_penalty,
    )


def _fingerprint(config_json: bytes, index: TensorIndex, dtype_name: str, *, has_mtp: bool) -> str:
    digest = hashlib.sha256(config_json)
    for name, entry in sorted(index.entries.items()):
        digest.update(f"\0{name} {entry.dtype} {entry.shape} {entry.num_bytes}".encode())
    digest.update(f"\0{dtype_name}{' mtp' if has_mtp else ''}".encode())
    return digest.hexdigest()
