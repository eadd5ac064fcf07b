"""Bytes of tensors from the shards of a checkpoint folder into memory.

Files are read, not mapped: a file that somebody cuts short would kill a process that has it mapped, here it is an error
that names it; and what is read can be counted. ``benchmarks/checkpoint_loading.py`` compares the two.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.folder import open_inside
from expertmesh.mesh.model.tensors import FETCH_AGAIN, TensorEntry

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
PIECE_BYTES = 2**20
"""Read at a time where what is stored has to be converted: it stays in a core's cache on its way."""


class TensorReader:
    """Safe to use from several threads; a shard is opened at its first use and stays so.

    ``on_read`` gets the number of bytes after each read, on the thread that read.
    """

    def __init__(self, folder: Path, on_read: Callable[[int], None]) -> None:
        self._folder = folder
        self._on_read = on_read
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def copy(self, entry: TensorEntry, out: torch.Tensor, *, row: int | None = None) -> None:
        """Copy a tensor, or one row along its first dimension, into ``out`` of the same shape, converting to its dtype.

        Raises:
            UserError: the file has gone or is shorter than it was, or cannot be read.
        """
        if row is None:
            assert out.numel() * TORCH_DTYPES[entry.dtype].itemsize == entry.num_bytes, (
                "the index has checked the shape"
            )
            self._copy(entry, entry.offset, out)
        else:
            self.copy_rows(entry, row, out.unsqueeze(0))

    def copy_rows(self, entry: TensorEntry, first: int, out: torch.Tensor) -> None:
        """As ``copy``, of as many rows as ``out`` has, from row ``first`` on."""
        row_bytes = entry.num_bytes // entry.shape[0]
        num_bytes = out.numel() * TORCH_DTYPES[entry.dtype].itemsize
        assert num_bytes == out.shape[0] * row_bytes, "the index has checked the tensor's shape"
        self._copy(entry, entry.offset + first * row_bytes, out)

    def _copy(self, entry: TensorEntry, begin: int, out: torch.Tensor) -> None:
        stored = TORCH_DTYPES[entry.dtype]
        if out.dtype == stored and out.device.type == "cpu" and out.is_contiguous():
            self._read(entry.shard, begin, out.view(-1))
        elif out.is_contiguous():
            self._convert(entry.shard, begin, stored, out.view(-1))
        else:
            whole = torch.empty(out.shape, dtype=stored)
            self._read(entry.shard, begin, whole.view(-1))
            out.copy_(whole)

    def _convert(self, shard: str, begin: int, stored: torch.dtype, out_N: torch.Tensor) -> None:
        size = PIECE_BYTES // stored.itemsize
        # Into a GPU from pinned memory: from any other the driver would copy it once more, for all threads in turn.
        piece = torch.empty(min(size, len(out_N)), dtype=stored, pin_memory=out_N.is_cuda)
        for first in range(0, len(out_N), size):
            target = out_N[first : first + size]
            self._read(shard, begin + first * stored.itemsize, piece[: len(target)])
            target.copy_(piece[: len(target)])

    def _read(self, shard: str, begin: int, out_N: torch.Tensor) -> None:
        # A read releases the interpreter's lock; one of more than 2 GiB comes back in parts.
        left = out_N.view(torch.uint8).numpy().data
        file = self._folder / shard
        try:
            descriptor = self._open(shard)
            while left:
                count = os.preadv(descriptor, [left], begin)
                if count == 0:
                    raise UserError(str(file), f"cannot be read (it ends at byte {begin})", FETCH_AGAIN)
                self._on_read(count)
                left, begin = left[count:], begin + count
        except OSError as error:
            raise UserError(str(file), f"cannot be read ({error.strerror})", FETCH_AGAIN) from None

    def _open(self, shard: str) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = open_inside(self._folder, shard)
            return self._descriptors[shard]


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
