"""The MoE block of DeepSeek-V3 and those after it: sigmoid scores, a bias that only chooses, groups, shared experts."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, GateVariant, Shared
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.fields import Fields


def expert_groups(config: Fields, experts: Mapping[str, int]) -> tuple[int, int]:
    """``n_group`` and ``topk_group``.

    Raises:
        UserError: the groups are not equal, or too few are chosen to have ``num_experts_per_tok`` experts.
    """
    num_experts, top_k = experts["num_experts"], experts["top_k"]
    groups = config.integer("n_group", 1)
    if num_experts % groups != 0:
        raise config.error("n_group", f"is {groups}", f"it must divide the {num_experts} experts")
    chosen = config.integer("topk_group", 1, maximum=groups)
    if chosen * (num_experts // groups) < top_k:
        raise config.error("topk_group", f"is {chosen}", f"its groups must hold {top_k} experts or more")
    return groups, chosen


def bias_corrected_gate(config: Fields, experts: Mapping[str, int]) -> GateVariant:
    """The gate of arXiv:2412.19437, section 2.1.2."""
    groups, chosen = expert_groups(config, experts)
    if experts["num_experts"] // groups < 2:
        raise config.error("n_group", f"is {groups}", "a group must have two experts or more")
    return GateVariant(
        scoring="sigmoid",
        correction=True,
        num_groups=groups,
        top_groups=chosen,
        scale=config.number("routed_scaling_factor", 1.0),
        float32=True,
    )


def shared_experts(config: Fields, *, default: int = 1) -> Shared | None:
    count = config.integer("n_shared_experts", default, minimum=0)
    return Shared(width=count * config.integer("moe_intermediate_size")) if count else None


def sparse_mlp_tensors(arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
    """The gate and the shared experts of a MoE layer, or the MLP of a dense one."""
    mlp = f"model.layers.{layer}.mlp"
    if layer not in arch.moe_layers:
        return standard.dense_tensors(arch, mlp)
    tensors = standard.router_tensors(arch, f"{mlp}.gate.weight")
    if arch.gate.correction:
        tensors["router_correction"] = NamedTensor(
            f"{mlp}.gate.e_score_correction_bias", (arch.num_experts,), float32=True
        )
    if arch.shared is not None:
        tensors |= standard.dense_tensors(arch, f"{mlp}.shared_experts", "shared_")
    return tensors
