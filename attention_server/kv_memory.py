"""The memory of a KV cache as blocks of bytes, for those who hand them from one cache to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class BlockMemory:
    """The KV blocks of all layers as bytes, wherever they are: both kinds of rank lay them out so.

    A block's bytes lie together in each layer and not beside those of the layer before. In latent attention a position
    has one row that is key and value: smaller blocks, no other layout.

    Args:
        layers: one tensor a layer, contiguous, all on one device, [N, ...] with N = blocks × ``block_size``.
    """

    def __init__(self, layers: Sequence[torch.Tensor], block_size: int) -> None:
        assert all(layer.is_contiguous() for layer in layers), "a layer's blocks lie side by side"
        self.block_size = block_size
        self.device = layers[0].device
        self.num_blocks = layers[0].shape[0] // block_size
        self._layers = tuple(layers)
        self.slabs = tuple(layer.nbytes // self.num_blocks for layer in layers)
        """Bytes of a block in each layer."""
        self._views = tuple(layer.view(torch.uint8).numpy().data.cast("B") for layer in layers if self.is_on_host)

    @property
    def is_on_host(self) -> bool:
        return self.device.type == "cpu"

    @property
    def block_bytes(self) -> int:
        """Of a block, all layers together."""
        return sum(self.slabs)

    @property
    def starts(self) -> tuple[int, ...]:
        """The address of each layer's first block."""
        return tuple(layer.data_ptr() for layer in self._layers)

    def regions(self) -> list[tuple[int, int]]:
        """All of the memory as addresses and sizes; layers that lie side by side are one region."""
        regions: list[tuple[int, int]] = []
        for start, size in sorted((layer.data_ptr(), layer.nbytes) for layer in self._layers):
            if regions and sum(regions[-1]) == start:
                start, before = regions.pop()
                size += before
            regions.append((start, size))
        return regions

    def views(self, block: int) -> list[memoryview]:
        """A block's bytes, layer after layer; writable. On the host only."""
        assert self.is_on_host, "memory of a device has no views"
        return [layer[block * slab : (block + 1) * slab] for layer, slab in zip(self._views, self.slabs, strict=True)]
