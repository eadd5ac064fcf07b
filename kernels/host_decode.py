"""One decoder layer's dense part on the CPU for a step of few tokens.

What torch does in some forty operators, each with its own overhead, is two calls here: attention with everything
around it, and the gate with its norm. The torch reference is ``attention_server.dense.DenseModel`` with
``PagedKvCache``, which also serves every other kind of step. float32 only.

Dimensions: T tokens, those of a sequence in the order of their positions; H hidden size; C query and key heads; D head
size; K KV heads; N cache positions; B blocks of a sequence; E experts; O outputs of a matrix product.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.kernels.compiled import compiled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_ZERO, _ONE = np.float32(0), np.float32(1)
_ROWS = 4


@compiled
def host_attention(
    x_TH: Floats,
    norm_H: Floats,
    qkv_OH: Floats,
    qkv_bias_O: Floats,
    qk_norm_CD: Floats,
    rotation_TD: Floats,
    cache_NKD: Floats,
    length_T: Ints,
    blocks_TB: Ints,
    block_size: int,
    output_HO: Floats,
    output_bias_H: Floats,
    epsilon: float,
) -> None:
    """Add a layer's attention to the residual stream ``x_TH``; the tokens' keys and values go into the cache.

    Args:
        qkv_OH: query, key and value projection, the features of a query or key head in pairs that rotate together.
        qkv_bias_O, output_bias_H: empty = no bias.
        rotation_TD: cosine and sine of each pair, side by side.
        cache_NKD: [N, 2K, D], a position's keys before its values.
        length_T: context of each token, itself included: it stands at position length - 1. What comes before it in its
            sequence is in the cache or earlier in the step.
        blocks_TB: the block table of each token's sequence.
    """
    num_tokens = x_TH.shape[0]
    qk_heads, dim = qk_norm_CD.shape
    kv_heads = cache_NKD.shape[1] // 2
    normed_TH = np.empty_like(x_TH)
    qkv_TO = np.empty((num_tokens, qkv_OH.shape[0]), np.float32)
    answer_TO = np.empty((num_tokens, (qk_heads - kv_heads) * dim), np.float32)
    _rms_norm(x_TH, norm_H, epsilon, normed_TH)
    _multiply(normed_TH, qkv_OH, qkv_TO)
    for token in range(num_tokens):
        for o in range(len(qkv_bias_O)):
            qkv_TO[token, o] += qkv_bias_O[o]
        heads = qkv_TO[token].reshape(-1, dim)
        _norm_and_rotate(heads[:qk_heads], qk_norm_CD, rotation_TD[token], epsilon)
        last = length_T[token] - 1
        place = blocks_TB[token, last // block_size] * block_size + last % block_size
        cache_NKD[place] = heads[qk_heads - kv_heads :]
        queries = heads[: qk_heads - kv_heads]
        _attend(queries, cache_NKD, last + 1, blocks_TB[token], block_size, answer_TO[token].reshape(-1, dim))
    _multiply(answer_TO, output_HO, normed_TH)
    _add_rows(normed_TH, output_bias_H, x_TH)


@compiled
def host_gate(
    x_TH: Floats,
    norm_H: Floats,
    router_EH: Floats,
    normalise: bool,
    epsilon: float,
    normed_TH: Floats,
    expert_TK: Ints,
    weight_TK: Floats,
) -> None:
    """The experts' input ``normed_TH`` and the softmax gate's choice, the greatest first.

    ``normalise``: the weights of a token add up to 1. Of equal experts the first wins.
    """
    num_tokens, top_k = expert_TK.shape
    score_TE = np.empty((num_tokens, router_EH.shape[0]), np.float32)
    _rms_norm(x_TH, norm_H, epsilon, normed_TH)
    _multiply(normed_TH, router_EH, score_TE)
    for token in range(num_tokens):
        score_E = score_TE[token]
        _softmax(score_E)
        total = _ZERO
        for k in range(top_k):
            best = 0
            for expert in range(1, len(score_E)):
                if score_E[expert] > score_E[best]:
                    best = expert
            expert_TK[token, k], weight_TK[token, k] = best, score_E[best]
            total += score_E[best]
            score_E[best] = -1
        if normalise:
            for k in range(top_k):
                weight_TK[token, k] /= total


@compiled
def _rms_norm(x_TH: Floats, norm_H: Floats, epsilon: float, out_TH: Floats) -> None:
    size = x_TH.shape[1]
    for token in range(x_TH.shape[0]):
        square = _ZERO
        for i in range(size):
            square += x_TH[token, i] * x_TH[token, i]
        scale = _ONE / np.sqrt(square / np.float32(size) + np.float32(epsilon))
        for i in range(size):
            out_TH[token, i] = x_TH[token, i] * scale * norm_H[i]


@compiled
def _norm_and_rotate(heads_CD: Floats, norm_CD: Floats, rotation_D: Floats, epsilon: float) -> None:
    _rms_norm_heads(heads_CD, norm_CD, epsilon)
    for head in range(heads_CD.shape[0]):
        for i in range(0, heads_CD.shape[1], 2):
            one, other = heads_CD[head, i], heads_CD[head, i + 1]
            cosine, sine = rotation_D[i], rotation_D[i + 1]
            heads_CD[head, i] = one * cosine - other * sine
            heads_CD[head, i + 1] = one * sine + other * cosine


@compiled
def _rms_norm_heads(heads_CD: Floats, norm_CD: Floats, epsilon: float) -> None:
    size = heads_CD.shape[1]
    for head in range(heads_CD.shape[0]):
        square = _ZERO
        for i in range(size):
            square += heads_CD[head, i] * heads_CD[head, i]
        scale = _ONE / np.sqrt(square / np.float32(size) + np.float32(epsilon))
        for i in range(size):
            heads_CD[head, i] *= scale * norm_CD[head, i]


@compiled
def _attend(
    query_CD: Floats, cache_NKD: Floats, length: int, block_B: Ints, block_size: int, answer_CD: Floats
) -> None:
    """One token's queries over its context; the query heads of a KV head stand together."""
    kv_heads, dim = cache_NKD.shape[1] // 2, query_CD.shape[1]
    heads = query_CD.shape[0]
    group = heads // kv_heads
    score_CL = np.empty((heads, length), np.float32)
    scale = _ONE / np.sqrt(np.float32(dim))
    for position in range(length):
        place = block_B[position // block_size] * block_size + position % block_size
        for head in range(heads):
            key, query = cache_NKD[place, head // group], query_CD[head]
            dot = _ZERO
            for i in range(dim):
                dot += query[i] * key[i]
            score_CL[head, position] = dot * scale
    for head in range(heads):
        _softmax(score_CL[head])
        answer_CD[head] = _ZERO
    for position in range(length):
        place = block_B[position // block_size] * block_size + position % block_size
        for head in range(heads):
            weight, value = score_CL[head, position], cache_NKD[place, kv_heads + head // group]
            answer = answer_CD[head]
            for i in range(dim):
                answer[i] += weight * value[i]


@compiled
def _softmax(score_L: Floats) -> None:
    greatest = score_L[0]
    for score in score_L:
        greatest = max(greatest, score)
    total = _ZERO
    for i in range(len(score_L)):
        score_L[i] = np.exp(score_L[i] - greatest)
        total += score_L[i]
    for i in range(len(score_L)):
        score_L[i] /= total


@compiled
def _multiply(x_TH: Floats, weight_OH: Floats, out_TO: Floats) -> None:
    """``x @ weight.T``; a weight is read once for four rows, whose sums stay in registers because each has a name."""
    num_tokens, features = x_TH.shape
    fours = num_tokens // _ROWS * _ROWS
    for first in range(0, fours, _ROWS):
        x0, x1, x2, x3 = x_TH[first], x_TH[first + 1], x_TH[first + 2], x_TH[first + 3]
        for o in range(weight_OH.shape[0]):
            weight = weight_OH[o]
            sum0 = sum1 = sum2 = sum3 = _ZERO
            for k in range(features):
                w = weight[k]
                sum0 += x0[k] * w
                sum1 += x1[k] * w
                sum2 += x2[k] * w
                sum3 += x3[k] * w
            out_TO[first, o] = sum0
            out_TO[first + 1, o] = sum1
            out_TO[first + 2, o] = sum2
            out_TO[first + 3, o] = sum3
    for token in range(fours, num_tokens):
        x0 = x_TH[token]
        for o in range(weight_OH.shape[0]):
            weight = weight_OH[o]
            sum0 = _ZERO
            for k in range(features):
                sum0 += x0[k] * weight[k]
            out_TO[token, o] = sum0


@compiled
def _add_rows(row_TO: Floats, bias_O: Floats, out_TO: Floats) -> None:
    for token in range(row_TO.shape[0]):
        for o in range(row_TO.shape[1]):
            out_TO[token, o] += row_TO[token, o]
        for o in range(len(bias_O)):
            out_TO[token, o] += bias_O[o]
