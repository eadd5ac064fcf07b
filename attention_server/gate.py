"""The gate: which experts a token goes to, and with what weights.

Dimensions: T tokens, E experts, K experts a token, G groups of experts.
"""

from __future__ import annotations

import torch

from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.architecture import Architecture, GateVariant

_TINY = 1e-20  # what DeepSeek-V3 adds to the sum that it divides by


def choose_experts(logits_TE: torch.Tensor, arch: Architecture, correction_E: torch.Tensor | None) -> Routes:
    """The ``top_k`` best experts of each token, as ``arch.gate`` scores them.

    Args:
        correction_E: added to the scores to choose by, not to those that become weights.

    Returns:
        Routes whose weights are rounded to the logits' dtype, as in transformers.
    """
    gate = arch.gate
    score_TE = logits_TE.softmax(-1, dtype=torch.float32) if gate.scoring == "softmax" else logits_TE.float().sigmoid()
    if correction_E is None and gate.num_groups == 1:
        weight_TK, expert_TK = score_TE.topk(arch.top_k)
    else:
        choice_TE = score_TE if correction_E is None else score_TE + correction_E
        if gate.num_groups > 1:
            choice_TE = _only_best_groups(choice_TE, gate)
        expert_TK = choice_TE.topk(arch.top_k).indices
        weight_TK = score_TE.gather(1, expert_TK)
    if arch.norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + _TINY)
    if gate.scale != 1.0:
        weight_TK = weight_TK * gate.scale
    return Routes(expert_TK, weight_TK.to(logits_TE.dtype).float())


def _only_best_groups(choice_TE: torch.Tensor, gate: GateVariant) -> torch.Tensor:
    """-inf for the experts of all groups but the ``top_groups`` best."""
    choice_TGX = choice_TE.view(len(choice_TE), gate.num_groups, -1)
    best = 1 if gate.group_score == "max" else 2
    score_TG = choice_TGX.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
    kept_TG.scatter_(1, score_TG.topk(gate.top_groups, dim=-1).indices, True)
    return choice_TGX.where(kept_TG[..., None], float("-inf")).view_as(choice_TE)
