"""What the checks of kernels have in common: random tensors, poisoned memory, what is near enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# bfloat16 keeps 8 bits, and the interpreter cuts off the others where hardware rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Draw:
    """Random tensors on a device, the same for a seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def order(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def in_parts(x: torch.Tensor, num_parts: int) -> torch.Tensor:
    """float32 parts of a product, all different, whose sum is exactly x (bfloat16) in any order; one = x itself."""
    if num_parts == 1:
        return x
    factor_P = 0.25 * torch.arange(1, num_parts + 1)
    factor_P[0] += 1 - factor_P.sum()
    return torch.stack([x.float() * factor for factor in factor_P.tolist()])


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel allocates and does not write holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, *, slack: float = 1) -> None:
    """In the mean and at the worst element, within ``slack`` times what is usual; NaN fails."""
    tolerance = slack * TOLERANCE[dtype]
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    difference, expected = actual.double() - expected.double(), expected.double()
    error = difference.norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"
    worst, top = difference.abs().amax(), expected.abs().amax()
    assert worst <= 2 * tolerance * top, f"an element is off by {worst:.2e}, the largest is {top:.2e}"
