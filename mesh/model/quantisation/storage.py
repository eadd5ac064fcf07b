"""How a checkpoint stores a tensor: as it is, or quantised beside its scales. Headers tell; torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.quantisation.formats import FP8_BLOCK, INT_BITS, MXFP4_GROUP, WORD_BITS
from expertmesh.mesh.model.tensors import READABLE_DTYPES, TensorEntry, TensorIndex

_SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor of floats."""

    name: str
    entry: TensorEntry

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {self.name: self.entry}


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """A matrix of float8 (E4M3), and for each block of 128 × 128 the factor ``scale`` that makes it the weight."""

    name: str
    weight: TensorEntry
    scale: TensorEntry

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {self.name: self.weight, f"{self.name}_scale_inv": self.scale}


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Matrices [E, I, O] stored as [E, O, I]: ``blocks`` [E, O, I/32, 16] of two floats each, ``scales``."""

    name: str
    blocks: TensorEntry
    scales: TensorEntry

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {f"{self.name}_blocks": self.blocks, f"{self.name}_scales": self.scales}


@dataclass(frozen=True, slots=True)
class PackedInts:
    """A matrix [O, I] of integers of 4 or 8 bits in 32-bit words, and a factor for each group of a row's numbers."""

    name: str
    packed: TensorEntry
    scale: TensorEntry
    shape: TensorEntry
    num_bits: int

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {f"{self.name}_packed": self.packed, f"{self.name}_scale": self.scale, f"{self.name}_shape": self.shape}


Storage = Plain | Fp8Blocks | Mxfp4 | PackedInts


def find_storage(index: TensorIndex, named: NamedTensor) -> Storage:
    """Where the numbers of a tensor are.

    Raises:
        UserError: a tensor that they take is missing, has another shape, or a dtype that is not read.
    """
    name, shape = named.name, named.shape
    entry = index.entries.get(name)
    if entry is None and f"{name}_blocks" in index.entries and len(shape) == 3:
        count, inputs, outputs = shape
        groups = (count, outputs, -(-inputs // MXFP4_GROUP))
        blocks = index.require(f"{name}_blocks", (*groups, MXFP4_GROUP // 2), ("U8",))
        return Mxfp4(name, blocks, index.require(f"{name}_scales", groups, ("U8",)))
    if entry is None and f"{name}_packed" in index.entries and len(shape) == 2:
        return _packed_ints(index, name, shape)
    if entry is not None and entry.dtype == "F8_E4M3" and f"{name}_scale_inv" in index.entries and len(shape) == 2:
        weight = index.require(name, shape, ("F8_E4M3",))
        blocks_of = tuple(-(-size // FP8_BLOCK) for size in shape)
        return Fp8Blocks(name, weight, index.require(f"{name}_scale_inv", blocks_of, _SCALE_DTYPES))
    return Plain(name, index.require(name, shape, READABLE_DTYPES))


def _packed_ints(index: TensorIndex, name: str, shape: tuple[int, ...]) -> PackedInts:
    rows, columns = shape
    words = {-(-columns * bits // WORD_BITS): bits for bits in INT_BITS}
    stored = index.entries[f"{name}_packed"].shape
    num_words = stored[-1] if stored and stored[-1] in words else min(words)
    packed = index.require(f"{name}_packed", (rows, num_words), ("I32",))
    # A factor for each row, or for each of so many equal groups of its numbers.
    given = index.entries.get(f"{name}_scale")
    groups = given.shape[-1] if given is not None and given.shape and given.shape[-1] > 0 else 1
    scale = index.require(f"{name}_scale", (rows, groups if columns % groups == 0 else 1), _SCALE_DTYPES)
    return PackedInts(name, packed, scale, index.require(f"{name}_shape", (2,), ("I64", "I32")), words[num_words])


def stored_bytes(index: TensorIndex, named: NamedTensor) -> int:
    """Bytes that a tensor takes in the files."""
    return sum(entry.num_bytes for entry in find_storage(index, named).tensors.values())
