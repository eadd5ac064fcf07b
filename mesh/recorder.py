"""The recorder of token-level routing: which experts each token of an attention half chose, layer by layer."""

from __future__ import annotations

import logging
import threading

import numpy as np
import numpy.typing as npt

from expertmesh.mesh.placement import Ints
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
KEPT_BYTES = 16 << 20
"""Recorded and not sent yet: a recording that gets beyond it ends there."""


class TraceRecorder:
    """Records the next tokens of completed steps when it is told to. Thread-safe: the step thread records, the event
    loop controls and takes.

    Dimensions: L MoE layers, T tokens, K experts a token.
    """

    def __init__(self, num_layers: int, top_k: int) -> None:
        self._token_bytes = num_layers * top_k * np.dtype(np.int16).itemsize
        self._top_k = top_k
        self._lock = threading.Lock()
        self._id = 0  # 0 = nothing to record or to send
        self._wanted = 0  # tokens still to record
        self._is_announced = False
        self._kept: list[npt.NDArray[np.int16]] = []
        self._num_kept = 0
        self._num_sent = 0

    @property
    def is_active(self) -> bool:
        """There is something to record or to send."""
        return self._id != 0

    def control(self, control: mesh_pb2.RecordControl) -> None:
        """Start a recording, which ends any other; or with ``max_tokens`` 0 end the one with this id and drop what is
        not sent. A recording that runs already is not started again."""
        with self._lock:
            if control.max_tokens == 0:
                if control.id == self._id:
                    self._reset(0, 0)
            elif control.id != self._id:
                self._reset(control.id, control.max_tokens)

    def _reset(self, record_id: int, wanted: int) -> None:
        self._id, self._wanted, self._is_announced = record_id, wanted, False
        self._kept, self._num_kept, self._num_sent = [], 0, 0

    def record(self, expert_LTK: Ints) -> None:
        """The tokens of a completed step."""
        if not self._wanted:
            return
        with self._lock:
            count = min(self._wanted, expert_LTK.shape[1])
            if (self._num_kept + count) * self._token_bytes > KEPT_BYTES:
                log.warning("recording %d ends early: %d tokens wait to be sent", self._id, self._num_kept)
                self._wanted = 0
            elif count:
                self._kept.append(expert_LTK[:, :count].astype(np.int16))
                self._num_kept += count
                self._wanted -= count

    def take(self) -> list[mesh_pb2.TraceChunk]:
        """What was recorded since the call before. The first chunk comes at once, be it empty: it says that the
        recording has begun. The last one says that it is done."""
        with self._lock:
            record_id, kept, ended = self._id, self._kept, not self._wanted
            is_due = bool(kept) or ended or not self._is_announced
            self._is_announced = True
            first_token = self._num_sent
            self._num_sent += self._num_kept
            self._kept, self._num_kept = [], 0
            if ended:
                self._reset(0, 0)
        if not record_id or not is_due:
            return []
        topk_LTK = np.concatenate(kept, axis=1) if kept else np.empty((0, 0, self._top_k), np.int16)
        chunks, size = [], max(1, CHUNK_BYTES // self._token_bytes)
        for start in range(0, max(1, topk_LTK.shape[1]), size):
            part_LTK = topk_LTK[:, start : start + size]
            chunks.append(
                mesh_pb2.TraceChunk(
                    record_id=record_id,
                    num_tokens=part_LTK.shape[1],
                    top_k=self._top_k,
                    topk=part_LTK.astype("<i2").tobytes(),
                    first_token=first_token + start,
                )
            )
        chunks[-1].done = ended
        return chunks
