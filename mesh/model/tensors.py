"""What tensors a checkpoint folder holds: names, shapes, dtypes and shards, read from headers without the weights.

The file format is safetensors': 8 bytes little-endian header length, a JSON header, the data. Nothing here imports
torch, so that the router can check a checkpoint cheaply.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.fields import parse_object, read_fields

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "BF16", "F16")
MAX_HEADER_BYTES = 100 * 10**6
"""safetensors' own limit."""

FETCH_AGAIN = "the download is incomplete or damaged: fetch the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: the shard that holds it, safetensors' dtype name, shape and bytes."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorIndex:
    """Every tensor of a folder by name."""

    path: Path
    entries: Mapping[str, TensorEntry]

    def require(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """The entry of a tensor that must be there.

        Raises:
            UserError: it is missing, has another shape, or a dtype that is not float32, bfloat16 or float16.
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
        if entry.dtype not in READABLE_DTYPES:
            raise UserError(
                name,
                f"has dtype {entry.dtype} in {self.path / entry.shard}",
                f"use a checkpoint stored as one of {', '.join(READABLE_DTYPES)}",
            )
        return entry


def read_tensor_index(path: Path) -> TensorIndex:
    """List the tensors of a folder with one ``model.safetensors`` or shards and an index.

    Raises:
        UserError: no weights, a missing or truncated shard, an index that leaves the folder or names a tensor its
            shard does not hold, bad JSON. The key is the file or the tensor.
    """
    if (path / INDEX_FILE).is_file():
        return TensorIndex(path=path, entries=_read_sharded(path))
    if (path / SINGLE_FILE).is_file():
        return TensorIndex(path=path, entries=_read_shard(path, SINGLE_FILE))
    raise UserError(
        str(path),
        f"holds neither {SINGLE_FILE} nor {INDEX_FILE}",
        "point model.path at a Hugging Face checkpoint with safetensors weights (other formats are not read)",
    )


def _read_sharded(path: Path) -> dict[str, TensorEntry]:
    index_path = path / INDEX_FILE
    weight_map = read_fields(index_path).data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index_path}: weight_map", "is not an object of tensor names and files", FETCH_AGAIN)
    held: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        _check_inside(index_path, shard)
        held.update(_read_shard(path, shard))
    for name, shard in weight_map.items():
        if name not in held or held[name].shard != shard:
            raise UserError(name, f"is not in {path / shard}, where {INDEX_FILE} puts it", FETCH_AGAIN)
    return {name: held[name] for name in weight_map}


def _check_inside(index_path: Path, shard: str) -> None:
    # Lexically: in Hugging Face's cache the shards themselves are symbolic links to ../../blobs.
    if "\\" in shard or "\0" in shard or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
        raise UserError(
            f"{index_path}: weight_map",
            f"names the file {shard!r}, outside the checkpoint folder",
            "use an index whose shards lie beside it",
        )


def _read_shard(path: Path, shard: str) -> dict[str, TensorEntry]:
    file = path / shard
    header, num_data_bytes = _read_header(file)
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        entry, end = _parse_entry(file, shard, name, item)
        if end > num_data_bytes:
            raise UserError(
                str(file),
                f"is truncated: {name} ends at byte {end} of the data, {num_data_bytes} are there",
                FETCH_AGAIN,
            )
        entries[name] = entry
    return entries


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        num_file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            num_header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= num_header_bytes <= min(MAX_HEADER_BYTES, num_file_bytes - 8):
                raise UserError(str(file), "has no whole safetensors header", FETCH_AGAIN)
            raw = stream.read(num_header_bytes)
    except FileNotFoundError:
        raise UserError(str(file), "is missing", "the checkpoint is incomplete: fetch this shard") from None
    except OSError as error:
        raise UserError(str(file), f"cannot be read ({error.strerror})", "make the file readable") from None
    return parse_object(raw, f"{file}: header"), num_file_bytes - 8 - num_header_bytes


def _parse_entry(file: Path, shard: str, name: str, item: Any) -> tuple[TensorEntry, int]:
    match item:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if 0 <= begin <= end and all(isinstance(size, int) and size >= 0 for size in shape):
                return TensorEntry(shard, dtype, tuple(shape), end - begin), end
    raise UserError(f"{file}: {name}", "has a malformed entry in the safetensors header", FETCH_AGAIN)
