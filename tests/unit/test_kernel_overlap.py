"""The share of exchanges that other kernels hide, of kernels whose times are known."""

from __future__ import annotations

import random

from support.kernel_overlap import KernelTime, hidden

DISPATCH, COMBINE = "void deep_ep::elastic::dispatch_impl<24>", "ncclDevKernel_SendRecv"
MLP, GROUP = "grouped_mlp_kernel", "_combine_kernel"


def test_an_exchange_is_hidden_as_far_as_others_run() -> None:
    kernels = [KernelTime(DISPATCH, 0, 10), KernelTime(MLP, 4, 6), KernelTime(GROUP, 5, 8), KernelTime(MLP, 12, 20)]
    assert hidden(kernels) == (10, 4)
    assert hidden([*kernels, KernelTime(COMBINE, 8, 14)]) == (14, 6)
    assert hidden(kernels[1:]) == (0, 0)


def test_against_counting_every_microsecond() -> None:
    dice = random.Random(1)
    kernels = []
    for _ in range(40):
        start = dice.randrange(300)
        kernels.append(KernelTime(dice.choice([DISPATCH, COMBINE, MLP, GROUP]), start, start + dice.randrange(1, 12)))
    runs = [
        [any(k.start <= t < k.end for k in kernels if k.is_exchange is kind) for t in range(320)]
        for kind in (True, False)
    ]
    both = sum(one and other for one, other in zip(*runs, strict=True))
    assert hidden(kernels) == (sum(runs[0]), both)
    assert 0 < both < sum(runs[0])
