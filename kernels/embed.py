"""Embedding rows of a step's tokens, of which those that the step before chose are known to the device alone.

Dimensions: T tokens, R rows of the sequence table, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WIDTH = 2048  # elements at a time


def embed_reference(
    token_T: torch.Tensor, row_T: torch.Tensor, last_R: torch.Tensor, embed_VH: torch.Tensor
) -> torch.Tensor:
    """``embed`` in plain torch."""
    return embed_VH[torch.where(token_T < 0, last_R[row_T.long()], token_T)]


def embed(token_T: torch.Tensor, row_T: torch.Tensor, last_R: torch.Tensor, embed_VH: torch.Tensor) -> torch.Tensor:
    """x[T, H] in memory of its own; one launch, no host synchronisation.

    Args:
        token_T: int32 or int64 ids; -1 = the last token of the token's sequence.
        row_T: int32 or int64, the sequence's row of ``last_R``.
        last_R: int64, the last token of each sequence.
    """
    num_tokens, hidden_size = len(token_T), embed_VH.shape[1]
    x_TH = embed_VH.new_empty(num_tokens, hidden_size)
    if num_tokens:
        width = min(_WIDTH, triton.next_power_of_2(hidden_size))
        _embed_kernel[(num_tokens, triton.cdiv(hidden_size, width))](
            token_T, row_T, last_R, embed_VH, x_TH, hidden_size, WIDTH=width, num_warps=4
        )
    return x_TH


@triton.jit
def _embed_kernel(tokens, rows, last, table, x, hidden_size, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + t).to(tl.int64)
    if token < 0:
        token = tl.load(last + tl.load(rows + t).to(tl.int64))
    h_H = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask_H = h_H < hidden_size
    tl.store(x + t * hidden_size + h_H, tl.load(table + token * hidden_size + h_H, mask=mask_H), mask=mask_H)
