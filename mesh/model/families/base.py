"""What a model family provides: how its config.json reads and what its tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.fields import Fields


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor as the checkpoint names it, with the shape that the architecture asks for."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """One expert's own tensors: ``gate`` and ``up`` [I, H], ``down`` [H, I]."""

    gate: NamedTensor
    up: NamedTensor
    down: NamedTensor


@dataclass(frozen=True, slots=True)
class FusedExpertTensors:
    """All experts of a layer in two tensors: ``gate_up`` [E, 2I, H] (gate first), ``down`` [E, H, I]."""

    gate_up: NamedTensor
    down: NamedTensor


class Family(Protocol):
    """One architecture. Tensors are named by their part:

    - model: ``embed`` [V, H], ``norm`` [H], ``lm_head`` [V, H] (not when embeddings are tied);
    - every layer: ``input_norm``, ``post_attention_norm`` [H], ``q_proj`` [heads·D, H], ``k_proj``, ``v_proj``
      [kv heads·D, H], ``o_proj`` [H, heads·D], their ``*_bias`` with ``attention_bias``, ``q_norm``, ``k_norm`` [D];
    - a MoE layer: ``router`` [E, H]; a dense layer: ``gate_proj``, ``up_proj`` [M, H], ``down_proj`` [H, M].
    """

    @property
    def name(self) -> str:
        """Hugging Face's ``model_type``."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The class names in ``architectures`` of config.json that this family serves."""

    def read(self, config: Fields) -> Architecture:
        """Raises ``UserError`` that names the key of config.json which is wrong or not supported."""

    def model_tensors(self, arch: Architecture) -> Mapping[str, NamedTensor]: ...

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]: ...

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors: ...

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors: ...
