"""What tensors a checkpoint folder holds: names, shapes, dtypes and shards, read from headers without the weights.

The file format is safetensors': 8 bytes little-endian header length, a JSON header, the data, of which every byte
belongs to one tensor. Nothing here imports torch, so that the router can check a checkpoint cheaply.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.fields import MAX_JSON_BYTES, is_integer, parse_object, read_fields
from expertmesh.mesh.model.folder import check_name, open_inside

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "BF16", "F16")
MAX_DIMENSIONS = 16
MAX_NAME = 1000
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Of one element, by safetensors' names."""

FETCH_AGAIN = "the download is incomplete or damaged: fetch the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: the shard that holds it, safetensors' dtype name, shape, and where in the file its bytes are."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorIndex:
    """Every tensor of a folder by name; ``unlisted``: those that the shards hold beyond what the index lists."""

    path: Path
    entries: Mapping[str, TensorEntry]
    unlisted: tuple[str, ...] = ()

    def require(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] = READABLE_DTYPES) -> TensorEntry:
        """The entry of a tensor that must be there.

        Raises:
            UserError: it is missing, has another shape, or a dtype that is not one of ``dtypes``.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(
                name, f"is not in the checkpoint {self.path}", "use the config.json that belongs to the weights"
            )
        if entry.shape != shape:
            raise UserError(
                name,
                f"has shape {list(entry.shape)} in {self.path / entry.shard}, config.json asks for {list(shape)}",
                "use the config.json that belongs to the weights",
            )
        if entry.dtype not in dtypes:
            raise UserError(
                name,
                f"has dtype {entry.dtype} in {self.path / entry.shard}",
                f"use a checkpoint stored as one of {', '.join(dtypes)}",
            )
        return entry


def read_tensor_index(path: Path) -> TensorIndex:
    """List the tensors of a folder with one ``model.safetensors`` or shards and an index.

    Raises:
        UserError: no weights, a missing or truncated shard, an index that leaves the folder or names a tensor its
            shard does not hold, bad JSON. The key is the file or the tensor.
    """
    if (path / INDEX_FILE).exists():
        return _read_sharded(path)
    if (path / SINGLE_FILE).exists():
        return TensorIndex(path=path, entries=_read_shard(path, SINGLE_FILE))
    raise UserError(
        str(path),
        f"holds neither {SINGLE_FILE} nor {INDEX_FILE}",
        "point model.path at a Hugging Face checkpoint with safetensors weights (other formats are not read)",
    )


def _read_sharded(path: Path) -> TensorIndex:
    index_path = path / INDEX_FILE
    weight_map = read_fields(index_path).data.get("weight_map")
    if not _is_weight_map(weight_map):
        raise UserError(f"{index_path}: weight_map", "is not an object of tensor names and files", FETCH_AGAIN)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        check_name(f"{index_path}: weight_map", shard)
    held = {shard: _read_shard(path, shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise UserError(name, f"is not in {path / shard}, where {INDEX_FILE} puts it", FETCH_AGAIN)
    return TensorIndex(
        path=path,
        entries={name: held[shard][name] for name, shard in weight_map.items()},
        unlisted=tuple(sorted({name for entries in held.values() for name in entries if name not in weight_map})),
    )


def _is_weight_map(value: object) -> TypeGuard[dict[str, str]]:
    if not isinstance(value, dict) or not value:
        return False
    return all(_is_name(name) and isinstance(shard, str) for name, shard in value.items())


def _is_name(name: str) -> bool:
    """Whether it can stand in a message."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def _read_shard(path: Path, shard: str) -> dict[str, TensorEntry]:
    """Raises ``UserError`` unless every byte of the data belongs to exactly one tensor, as the format asks."""
    file = path / shard
    header, data_begin, num_data_bytes = _read_header(path, shard)
    header.pop("__metadata__", None)
    entries = {name: _parse_entry(file, shard, name, item, data_begin) for name, item in header.items()}
    end = data_begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise UserError(
                f"{file}: {name}",
                f"begins at byte {entry.offset - data_begin} of the data, what is before it ends at {end - data_begin}",
                FETCH_AGAIN,
            )
        end = entry.offset + entry.num_bytes
        if end - data_begin > num_data_bytes:
            raise UserError(
                str(file),
                f"is truncated: {name} ends at byte {end - data_begin} of the data, {num_data_bytes} are there",
                FETCH_AGAIN,
            )
    if end - data_begin != num_data_bytes:
        raise UserError(
            str(file), f"has {num_data_bytes - (end - data_begin)} bytes after its last tensor", FETCH_AGAIN
        )
    return entries


def _read_header(path: Path, shard: str) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and its bytes."""
    file = path / shard
    try:
        with os.fdopen(open_inside(path, shard), "rb") as stream:
            num_file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            num_header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= num_header_bytes <= min(MAX_JSON_BYTES, num_file_bytes - 8):
                raise UserError(str(file), "has no whole safetensors header", FETCH_AGAIN)
            raw = stream.read(num_header_bytes)
    except FileNotFoundError:
        raise UserError(str(file), "is missing", "the checkpoint is incomplete: fetch this shard") from None
    except OSError as error:
        raise UserError(str(file), f"cannot be read ({error.strerror})", "make the file readable") from None
    data_begin = 8 + num_header_bytes
    return parse_object(raw, f"{file}: header"), data_begin, num_file_bytes - data_begin


def _parse_entry(file: Path, shard: str, name: str, item: Any, data_begin: int) -> TensorEntry:
    match item:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            are_sizes = all(is_integer(size, 0, 2**63 - 1) for size in (begin, end, *shape))
            if are_sizes and begin <= end and len(shape) <= MAX_DIMENSIONS and _is_name(name) and _is_name(dtype):
                _check_size(file, name, dtype, shape, end - begin)
                return TensorEntry(shard, dtype, tuple(shape), data_begin + begin, end - begin)
    raise UserError(f"{file}: {name!r:.200}", "has a malformed entry in the safetensors header", FETCH_AGAIN)


def _check_size(file: Path, name: str, dtype: str, shape: list[int], num_bytes: int) -> None:
    """A dtype that is not known passes: nothing of it will be read."""
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != 8 * num_bytes:
        raise UserError(
            f"{file}: {name}",
            f"has {num_bytes} bytes, which a {dtype} tensor of shape {shape} has not",
            FETCH_AGAIN,
        )
