"""Made-up routing for the solver's and the simulator's tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def topic_tokens(
    num_experts: int, top_k: int, num_tokens: int, *, seed: int, topics: int = 6, strength: float = 2.0
) -> NDArray[np.int16]:
    """int16 [tokens, K]: experts come in topics, and some are hot."""
    rng = np.random.default_rng(seed)
    favour_PE = strength * rng.standard_normal((topics, num_experts)) + rng.standard_normal(num_experts)
    logits_TE = favour_PE[rng.integers(0, topics, num_tokens)] + rng.gumbel(size=(num_tokens, num_experts))
    return np.argsort(-logits_TE, axis=1)[:, :top_k].astype(np.int16)
