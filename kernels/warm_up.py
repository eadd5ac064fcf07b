"""Compile the CPU kernels ahead of need: ``python -m expertmesh.kernels.warm_up``.

A rank does this before it joins a view, because a step waits for no compiler. The first time on a machine takes some
ten seconds, afterwards the kernels come from numba's cache in a fraction of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from expertmesh.kernels.host_decode import host_attention, host_gate
from expertmesh.kernels.host_exchange import host_count, host_expand, host_pack, host_sum, host_weighted_sum
from expertmesh.kernels.host_mlp import host_expert_mlp
from expertmesh.kernels.host_ngram import host_draft
from expertmesh.kernels.host_replicas import host_choose_replicas

_HIDDEN, _DIM, _SLOTS, _TOP_K = 4, 2, 2, 1

LOCK_TIMEOUT_S = 60.0
"""A process that hangs while it compiles must not keep the others of its machine from starting."""
_LOCK_POLL_S = 0.1


def warm_up(*, attention: bool = True, experts: bool = True) -> None:
    """Run every kernel of these halves once on a few numbers. Processes that find no cache compile one by one."""
    with contextlib.nullcontext() if _is_cached() else _alone():
        if attention:
            _warm_attention()
        if experts:
            _warm_experts()


def _warm_attention() -> None:
    x_TH, norm_H, none = np.ones((1, _HIDDEN), np.float32), np.ones(_HIDDEN, np.float32), np.empty(0, np.float32)
    one_head = np.ones((2, _DIM), np.float32)
    host_attention(
        x_TH,
        norm_H,
        np.ones((3 * _DIM, _HIDDEN), np.float32),
        none,
        one_head,
        np.ones((1, _DIM), np.float32),
        np.zeros((4, 2, _DIM), np.float32),
        np.ones(1, np.int64),
        np.zeros((1, 1), np.int64),
        4,
        np.ones((_HIDDEN, _DIM), np.float32),
        none,
        1e-6,
    )
    expert_TK, weight_TK = np.zeros((1, _TOP_K), np.int64), np.ones((1, _TOP_K), np.float32)
    router_EH = np.ones((_SLOTS, _HIDDEN), np.float32)
    host_gate(x_TH, norm_H, router_EH, True, 1e-6, np.empty_like(x_TH), expert_TK, weight_TK)
    home_EW, price_R, slot_TK = np.zeros((_SLOTS, 2), np.int64), np.zeros(1), np.empty_like(expert_TK)
    node_R, share_R = np.zeros(1, np.int64), np.ones(1)
    host_choose_replicas(expert_TK, home_EW, home_EW, node_R, -1, -1, share_R, price_R, np.empty_like(price_R), slot_TK)
    message_MW, sent_R = np.zeros((2, _HIDDEN + 2 * _TOP_K), np.int32), np.zeros(1, np.int64)
    token_N = np.zeros(1, np.int64)
    host_pack(x_TH.view(np.int32), weight_TK.view(np.int32), expert_TK, _SLOTS, message_MW, token_N, sent_R)
    host_sum(x_TH, token_N, np.empty_like(x_TH))
    host_draft(np.zeros(2, np.int64), 1, 1, np.empty(1, np.int64))


def _warm_experts() -> None:
    inbox_RMW = np.zeros((1, 2, _HIDDEN + 2 * _TOP_K), np.int32)
    inbox_RMW[0, 0, 0] = 1
    source_I, counts_S = np.zeros(1, np.int64), np.zeros(_SLOTS, np.int64)
    total = host_count(inbox_RMW, source_I, _HIDDEN + _TOP_K, _TOP_K, 0, counts_S)
    x_MW, row_M, weight_M = (
        np.zeros((total, _HIDDEN), np.int32),
        np.zeros(total, np.int64),
        np.zeros(total, np.int32),
    )
    host_expand(inbox_RMW, source_I, _HIDDEN, _TOP_K, 0, counts_S, x_MW, row_M, weight_M)
    x_MH = x_MW.view(np.float32)
    y_MH = np.empty_like(x_MH)
    gate_up_SFH = np.zeros((_SLOTS, 2 * _DIM, _HIDDEN), np.float32)
    host_expert_mlp(x_MH, counts_S, gate_up_SFH, np.zeros((_SLOTS, _HIDDEN, _DIM), np.float32), y_MH)
    host_weighted_sum(y_MH, row_M, weight_M.view(np.float32), np.empty_like(x_MH))


def _is_cached() -> bool:
    """Whether the folder beside the sources has an index of every kernel that is newer than its source."""
    kernels = [host_attention, host_gate, host_count, host_expand, host_pack, host_sum, host_weighted_sum]
    kernels += [host_choose_replicas, host_expert_mlp, host_draft]
    return all(_has_index(kernel.__module__, kernel.__name__) for kernel in kernels)


def _has_index(module: str, name: str) -> bool:
    source = Path(__file__).with_name(module.rpartition(".")[2] + ".py")
    indexes = source.parent.glob(f"__pycache__/{source.stem}.{name}-*.nbi")
    return any(index.stat().st_mtime >= source.stat().st_mtime for index in indexes)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Only one process of this machine at a time; whoever has waited ``LOCK_TIMEOUT_S`` compiles all the same."""
    folder = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        while not _try_lock(folder) and time.monotonic() < deadline_s:
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(folder)


def _try_lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    warm_up()
