"""What a model family provides: how its config.json reads and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.fields import Fields


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor as the checkpoint names it, with the shape that the architecture asks for.

    ``float32``: it is kept so whatever the mesh computes in.
    """

    name: str
    shape: tuple[int, ...]
    float32: bool = False


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """One expert's own tensors: ``gate`` and ``up`` [I, H], ``down`` [H, I]."""

    gate: NamedTensor
    up: NamedTensor
    down: NamedTensor

    @property
    def all(self) -> tuple[NamedTensor, ...]:
        return self.gate, self.up, self.down


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedExpertTensors:
    """All experts of a layer in two tensors: ``gate_up`` [E, 2I, H] (gate first), ``down`` [E, H, I].

    ``transposed``: [E, H, 2I] and [E, I, H]. ``interleaved``: gate and up take turns. Biases are [E, 2I] and [E, H].
    """

    gate_up: NamedTensor
    down: NamedTensor
    gate_up_bias: NamedTensor | None = None
    down_bias: NamedTensor | None = None
    transposed: bool = False
    interleaved: bool = False

    @property
    def all(self) -> tuple[NamedTensor, ...]:
        named = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return tuple(tensor for tensor in named if tensor is not None)


class Family(Protocol):
    """One architecture. Tensors are named by their part; a part that a variant lacks is not there:

    - model: ``embed`` [V, H], ``norm`` [H], ``lm_head`` [V, H] (not when embeddings are tied);
    - every layer: ``input_norm``, ``post_attention_norm`` [H], ``o_proj`` [H, heads·D];
    - grouped-query attention: ``q_proj`` [heads·D, H], ``k_proj``, ``v_proj`` [kv heads·D, H], the four's ``*_bias``,
      ``q_norm``, ``k_norm`` [D] or, normed as a row, [heads·D] and [kv heads·D]; ``sinks`` [heads];
    - latent attention: ``q_proj``, or ``q_a_proj`` [q rank, H], ``q_a_norm`` and ``q_b_proj``; ``kv_a_proj`` [kv rank +
      rope, H], ``kv_a_norm``, ``kv_b_proj`` [heads·(nope + value), kv rank]; ``q_a_bias``, ``kv_a_bias``, ``o_bias``;
    - a MoE layer: ``router`` [E, H], ``router_bias``, ``router_correction`` [E]; ``shared_gate_proj``,
      ``shared_up_proj`` [W, H], ``shared_down_proj`` [H, W], ``shared_router`` [1, H];
    - a dense layer: ``gate_proj``, ``up_proj`` [M, H], ``down_proj`` [H, M].
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

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors | None:
        """None where checkpoints of the family have no tensors of single experts."""

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors | None:
        """None where they have no tensors of all experts."""


def stored_experts(
    family: Family, arch: Architecture, layer: int, has: Callable[[str], bool]
) -> FusedExpertTensors | Sequence[ExpertTensors]:
    """The layout in which a checkpoint that ``has`` certain tensors stores a layer's experts."""
    fused = family.fused_expert_tensors(arch, layer)
    if fused is not None and (has(fused.gate_up.name) or family.expert_tensors(arch, layer, 0) is None):
        return fused
    own = [family.expert_tensors(arch, layer, expert) for expert in range(arch.num_experts)]
    return [tensors for tensors in own if tensors is not None]
