"""The MLP of a dense layer and of shared experts, which the attention rank computes itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from expertmesh.attention_server.linear import Linear


class Mlp:
    """``down(silu(gate(x)) · up(x))``, [T, H] → [T, H], times the sigmoid of a logit where there is a ``router``."""

    def __init__(self, parts: Mapping[str, torch.Tensor], kind: str = "") -> None:
        """``parts`` by the names of ``families.base.Family``, which begin with ``kind``."""
        self._gate_up = Linear(torch.cat([parts[f"{kind}gate_proj"], parts[f"{kind}up_proj"]]))
        self._down = Linear(parts[f"{kind}down_proj"])
        self._router_1H = parts.get(f"{kind}router") if kind else None

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate_TM, up_TM = self._gate_up(x_TH).chunk(2, dim=-1)
        out_TH = self._down(F.silu(gate_TM).mul_(up_TM))
        if self._router_1H is not None:
            out_TH *= F.linear(x_TH, self._router_1H).sigmoid()
        return out_TH
