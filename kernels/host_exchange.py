"""Index work of the data plane's dispatch and combine on the CPU: what goes where, and the sums on the way back.

The rows of a message are int32 [W]: the hidden state's words, K weights (float32 bits), K global slots.

Dimensions: T tokens, K experts a token, R expert ranks, S slots a rank, M rows by (token, local slot), N rows received,
W words of a row, H hidden size, I messages.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.kernels.compiled import compiled

Words = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@compiled
def host_pack(
    x_TW: Words, weight_TK: Words, slot_TK: Ints, slots_per_rank: int, message_MW: Words, token_N: Ints, sent_R: Ints
) -> None:
    """One message for each expert rank, one after the other: a head row, then a row for each token that goes there.

    ``message_MW`` and ``token_N`` have room for every token at every rank. ``sent_R`` gets the rows of each rank,
    ``token_N`` the token of each row, heads not counted. Only the first word of a head, its rows, is written.
    A slot of -1 goes nowhere.
    """
    words, top_k = x_TW.shape[1], slot_TK.shape[1]
    place, row = 0, 0
    for rank in range(len(sent_R)):
        head = place
        place += 1
        first, last = rank * slots_per_rank, (rank + 1) * slots_per_rank
        for token in range(slot_TK.shape[0]):
            visits = False
            for k in range(top_k):
                visits |= first <= slot_TK[token, k] < last
            if not visits:
                continue
            for i in range(words):
                message_MW[place, i] = x_TW[token, i]
            for k in range(top_k):
                message_MW[place, words + k] = weight_TK[token, k]
                message_MW[place, words + top_k + k] = slot_TK[token, k]
            token_N[row] = token
            place += 1
            row += 1
        sent_R[rank] = message_MW[head, 0] = place - head - 1


@compiled
def host_count(inbox_RMW: Words, source_I: Ints, slot_column: int, top_k: int, first_slot: int, counts_S: Ints) -> int:
    """Rows for each local slot into ``counts_S``; returns their sum. A message's head says how many rows it has."""
    num_slots, total = len(counts_S), 0
    counts_S[:] = 0
    for source in source_I:
        message = inbox_RMW[source]
        for row in range(1, 1 + message[0, 0]):
            for k in range(top_k):
                slot = message[row, slot_column + k] - first_slot
                if 0 <= slot < num_slots:
                    counts_S[slot] += 1
                    total += 1
    return total


@compiled
def host_expand(
    inbox_RMW: Words,
    source_I: Ints,
    words: int,
    top_k: int,
    first_slot: int,
    counts_S: Ints,
    x_MW: Words,
    row_M: Ints,
    weight_M: Words,
) -> None:
    """Received rows grouped by local slot; ``row_M`` is the received row, over all messages, that a row came from."""
    next_S = np.cumsum(counts_S) - counts_S
    received = 0
    for source in source_I:
        message = inbox_RMW[source]
        for row in range(1, 1 + message[0, 0]):
            for k in range(top_k):
                slot = message[row, words + top_k + k] - first_slot
                if 0 <= slot < len(counts_S):
                    place = next_S[slot]
                    next_S[slot] += 1
                    for i in range(words):
                        x_MW[place, i] = message[row, i]
                    row_M[place], weight_M[place] = received, message[row, words + k]
            received += 1


@compiled
def host_weighted_sum(y_MH: Floats, row_M: Ints, weight_M: Floats, sum_NH: Floats) -> None:
    """``sum_NH[n]`` = Σ of weight × y over the rows that came from n; 0 where there is none."""
    sum_NH[:] = 0
    for m in range(len(row_M)):
        weight, total = weight_M[m], sum_NH[row_M[m]]
        for i in range(y_MH.shape[1]):
            total[i] += weight * y_MH[m, i]


@compiled
def host_sum(back_NH: Floats, token_N: Ints, out_TH: Floats) -> None:
    """``out_TH[t]`` = Σ of the rows of token t."""
    out_TH[:] = 0
    for n in range(len(token_N)):
        total = out_TH[token_N[n]]
        for i in range(back_NH.shape[1]):
            total[i] += back_NH[n, i]
