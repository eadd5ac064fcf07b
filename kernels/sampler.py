"""Sampling without host synchronisation: the Gumbel-max trick with noise that depends on (seed, position, token) alone.

argmax(logit / temperature + Gumbel noise) is distributed as softmax(logits / temperature) (Gumbel 1954; Maddison et al.
2014, "A* Sampling"). The noise is Philox-4×32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3":
seven rounds pass BigCrush).

Dimensions: S sequences, V vocabulary, B blocks of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import IS_INTERPRETED

_BLOCK_TOKENS = 4096
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = tl.constexpr(7)
_LN_2 = tl.constexpr(0.6931471805599453)
_SMALL = tl.constexpr(2.0**-5)
_UNIT = tl.constexpr(2.0**-32)
_MASK = 0xFFFFFFFF


def gumbel_argmax_reference(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor
) -> torch.Tensor:
    """``gumbel_argmax`` in plain torch."""
    token_V = torch.arange(logits_SV.shape[1], device=logits_SV.device)
    words = _philox(seed_S[:, None], token_V[None, :] // 4, position_S[:, None])
    bits_SV = torch.stack(words, -1).gather(-1, (token_V % 4).expand(len(seed_S), -1)[..., None])[..., 0]
    exponential_SV = -torch.log1p(-(bits_SV.double() + 0.5) * 2.0**-32)
    hot_S1 = (temperature_S > 0)[:, None]
    scaled_SV = logits_SV.float() / torch.where(hot_S1, temperature_S[:, None], 1.0)
    key_SV = torch.where(hot_S1, scaled_SV - torch.log(exponential_SV).float(), scaled_SV)
    return key_SV.argmax(-1)


def _philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four words of 32 bits, as int64, for each (seed, counters); int64 arithmetic wraps as unsigned does."""
    c0, c1 = torch.broadcast_tensors(c0 & _MASK, c1 & _MASK)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS.value):
        product_0, product_1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c2 = (product_1 >> 32 & _MASK) ^ c1 ^ k0, (product_0 >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        k0, k1 = k0 + _PHILOX_KEYS[0] & _MASK, k1 + _PHILOX_KEYS[1] & _MASK
    return c0, c1, c2, c3


def gumbel_argmax(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor
) -> torch.Tensor:
    """The next token of each sequence: greedy at temperature 0, else a draw from softmax(logits / temperature).

    The draw depends on the sequence's logits, seed and position, and on nothing else of the batch. Ties go to the
    lowest id. Nothing is synchronised with the host.

    Args:
        logits_SV: float32 or bfloat16, contiguous rows; -inf forbids a token.
        temperature_S: float32, ≥ 0. seed_S: int64. position_S: int32 or int64, ≥ 0.

    Returns:
        token_S int64.
    """
    num_seqs, vocab_size = logits_SV.shape
    token_S = torch.empty(num_seqs, dtype=torch.int64, device=logits_SV.device)
    if num_seqs == 0:
        return token_S
    blocks = triton.cdiv(vocab_size, _BLOCK_TOKENS)
    best_SB = torch.empty(num_seqs, blocks, dtype=torch.float32, device=logits_SV.device)
    best_token_SB = torch.empty(num_seqs, blocks, dtype=torch.int32, device=logits_SV.device)
    _best_of_block_kernel[(num_seqs, blocks)](
        logits_SV,
        temperature_S,
        seed_S,
        position_S,
        best_SB,
        best_token_SB,
        vocab_size,
        logits_SV.stride(0),
        BLOCK=_BLOCK_TOKENS,
        IS_INTERPRETED=IS_INTERPRETED,
        num_warps=8,
    )
    _best_block_kernel[(num_seqs,)](
        best_SB, best_token_SB, token_S, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1
    )
    return token_S


@triton.jit
def _log(x, IS_INTERPRETED: tl.constexpr):
    """The hardware's logarithm, exact to 2⁻²²: one instruction, where a rounded one takes twenty."""
    if IS_INTERPRETED:
        log2 = tl.log2(x)
    else:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return log2 * _LN_2


@triton.jit
def _gumbel(bits, IS_INTERPRETED: tl.constexpr):
    """-log(E) of the exponential E = -log(1 - v), v = (bits + ½) / 2³²; a series where 1 - v would lose v's digits."""
    v = (bits.to(tl.float32) + 0.5) * _UNIT
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
    return -_log(tl.where(v < _SMALL, series, -_log(1.0 - v, IS_INTERPRETED)), IS_INTERPRETED)


@triton.jit
def _best_of_block_kernel(
    logits, temperatures, seeds, positions, best, best_token, vocab_size, stride, BLOCK: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    block = tl.program_id(1)
    quad_Q = tl.arange(0, BLOCK // 4)
    token_Q4 = block * BLOCK + 4 * quad_Q[:, None] + tl.arange(0, 4)[None, :]
    at = logits + seq.to(tl.int64) * stride + token_Q4
    key_Q4 = tl.load(at, mask=token_Q4 < vocab_size, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + seq)
    if temperature > 0:
        seed = tl.load(seeds + seq)
        c0 = (block * (BLOCK // 4) + quad_Q).to(tl.uint32)
        c1 = tl.zeros_like(c0) + tl.load(positions + seq).to(tl.uint32)
        zero = tl.zeros_like(c0)
        # One Philox block makes the noise of four tokens.
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, _ROUNDS)
        bits_Q4 = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK // 4, 4))
        key_Q4 = key_Q4 / temperature + _gumbel(bits_Q4, IS_INTERPRETED)
    key = tl.reshape(key_Q4, (BLOCK,))
    value = tl.max(key, 0)
    token = block * BLOCK + tl.min(tl.where(key == value, tl.arange(0, BLOCK), BLOCK - 1), 0)
    place = seq * tl.num_programs(1) + block
    tl.store(best + place, value)
    tl.store(best_token + place, token)


@triton.jit
def _best_block_kernel(best, best_token, out, blocks, BLOCKS: tl.constexpr):
    seq = tl.program_id(0)
    block_B = tl.arange(0, BLOCKS)
    value_B = tl.load(best + seq * blocks + block_B, mask=block_B < blocks, other=float("-inf"))
    first = tl.min(tl.where(value_B == tl.max(value_B, 0), block_B, BLOCKS - 1), 0)
    tl.store(out + seq, tl.load(best_token + seq * blocks + first).to(tl.int64))
