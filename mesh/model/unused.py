"""Tensors of a checkpoint that no part of the model uses: a hint that config.json and weights do not fit together."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.families.base import Family
from expertmesh.mesh.model.quantisation.storage import find_storage
from expertmesh.mesh.model.spec import needed_tensors
from expertmesh.mesh.model.tensors import TensorIndex

log = logging.getLogger(__name__)

NUM_NAMED = 3

HARMLESS = {
    "buffers that are computed": re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$"),
    "multi-token prediction": re.compile(r"^(model\.)?mtp\."),
    "vision": re.compile(r"^(model\.)?(vision_model|visual|vision_tower|multi_modal_projector)\."),
    "scales of a quantised KV cache": re.compile(r"\.([kv]_scale|kv_scale)$"),
}
_LAYER = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusedTensors:
    """``unexpected`` names, sorted; ``ignored``: how many there are of each kind that is known to be left out."""

    unexpected: tuple[str, ...]
    ignored: Mapping[str, int]

    def log_for(self, index: TensorIndex) -> None:
        """A warning that names the first few, and a line about what is left out on purpose."""
        if self.unexpected:
            more = len(self.unexpected) - NUM_NAMED
            log.warning(
                "%s: no part of the model uses %s%s; check that config.json belongs to the weights",
                index.path,
                ", ".join(self.unexpected[:NUM_NAMED]),
                f" and {more} other tensors" if more > 0 else "",
            )
        for kind, count in self.ignored.items():
            log.info("%s: %d tensors are left out: %s", index.path, count, kind)


def find_unused(family: Family, arch: Architecture, index: TensorIndex) -> UnusedTensors:
    """Compare the folder's tensors with the architecture's."""
    needed = {name for tensor in needed_tensors(family, arch, index) for name in find_storage(index, tensor).tensors}
    unexpected: list[str] = []
    ignored: dict[str, int] = {}
    for name in sorted({*index.entries, *index.unlisted} - needed):
        kind = _harmless_kind(name, arch)
        if kind is None:
            unexpected.append(name)
        else:
            ignored[kind] = ignored.get(kind, 0) + 1
    return UnusedTensors(unexpected=tuple(unexpected), ignored=ignored)


def _harmless_kind(name: str, arch: Architecture) -> str | None:
    layer = _LAYER.match(name)
    if layer is not None and int(layer[1]) >= arch.num_layers:
        return "multi-token prediction"  # DeepSeek's and GLM's come as layers after the last
    if name.endswith("lm_head.weight") and arch.tie_word_embeddings:
        return "an LM head that is tied to the embedding"
    return next((kind for kind, pattern in HARMLESS.items() if pattern.search(name)), None)
