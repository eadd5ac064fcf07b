"""RMS norm, as every family has it."""

from __future__ import annotations

import torch


class RmsNorm:
    """``x / √(mean(x²) + ε) · weight`` over the last dimension, in float32; rounded before the weight.

    Args:
        weight: of the last dimension, or of the last two where they are normed one by one.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self.weight = weight
        self._epsilon = torch.tensor(epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return normalise(x, self._epsilon).mul_(self.weight)


def normalise(x: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """RMS norm without a weight, in new memory and x's dtype; ``epsilon`` is a float32 scalar."""
    x32 = x.float()
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    # A third faster than F.rms_norm, which is a dozen small operations on the CPU.
    scale = torch.addcmul(epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x32 * scale).to(x.dtype)
