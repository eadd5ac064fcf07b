"""What all layers of a step share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.step_index import StepIndex


@dataclass(frozen=True, slots=True)
class StepContext:
    """``rotation_T1R`` complex64 [T, 1, D/2] turns the tokens' queries and keys.

    ``rotation_TD``: the same as cosine and sine side by side.
    """

    index: StepIndex
    rotation_T1R: torch.Tensor
    rotation_TD: np.ndarray
