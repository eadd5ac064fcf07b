"""Checkpoints with a layer of multi-token prediction, and the layer as a formula over transformers' decoder layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.families import load_reference, make_family_checkpoint

LAYERS = 3
QUIET = ("o_proj.weight", "down_proj.weight", "down_proj")


def make_mtp_checkpoint(
    path: Path, *, seed: int, loudness: float = 1.0, family: str = "deepseek_v3", **keys: Any
) -> Path:
    """A random checkpoint of ``LAYERS`` layers and one of multi-token prediction, which is transformers' fourth one.

    Args:
        loudness: what layers add to the residual stream is multiplied by it. With 0 the next token is a function of
            the last one, and drafts are always right: the layer hands on the embedding of the token that it gets.
    """
    make_family_checkpoint(path, family, seed=seed, num_hidden_layers=LAYERS + 1, **keys)
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(seed)
    prefix = f"model.layers.{LAYERS}"
    faithful = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    noise = torch.randn(hidden, 2 * hidden, generator=generator) * hidden**-0.5
    tensors[f"{prefix}.eh_proj.weight"] = faithful + loudness * noise
    for name in ("enorm", "hnorm", "shared_head.norm"):
        spread = torch.rand(hidden, generator=generator) - 0.5
        tensors[f"{prefix}.{name}.weight"] = 1 + loudness * spread
    if loudness < 1:
        tensors[f"{prefix}.shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    # Published checkpoints hold copies; these are different, so that reading them would show.
    tensors[f"{prefix}.embed_tokens.weight"] = torch.randn(config["vocab_size"], hidden, generator=generator)
    tensors[f"{prefix}.shared_head.head.weight"] = torch.randn(config["vocab_size"], hidden, generator=generator)
    for name, tensor in tensors.items():
        if name.endswith(QUIET):
            tensors[name] = tensor * loudness
    save_file(tensors, path / "model.safetensors")
    return path


class MtpFormula:
    """x = P·[norm(e); norm(h)], transformers' decoder layer, norm, head; whole sequences at once, without a cache."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """``scratch``: where a copy of the checkpoint with one more layer is written, for transformers to read."""
        self._model = load_reference(path)
        shutil.copytree(path, scratch)
        config = json.loads((scratch / "config.json").read_text())
        (scratch / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS + 1}))
        self._deeper = load_reference(scratch)
        self._epsilon = float(config["rms_norm_eps"])
        prefix = f"model.layers.{LAYERS}."
        self._tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_file(path / "model.safetensors").items()
            if name.startswith(prefix)
        }

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self._epsilon).rsqrt()
        return x * scale * self._tensors[f"{name}.weight"]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of the draft that follows ``tokens``: float32 [V]."""
        ids = torch.tensor([list(tokens)])
        with torch.inference_mode():
            hidden = self._model.model(ids[:, :-1]).last_hidden_state  # behind the last norm
            embedded = self._model.model.embed_tokens(ids[:, 1:])
            both = torch.cat([self._norm(embedded, "enorm"), self._norm(hidden, "hnorm")], dim=-1)
            x = both @ self._tensors["eh_proj.weight"].T
            position = torch.arange(x.shape[1])[None]
            mask = torch.full((1, 1, x.shape[1], x.shape[1]), float("-inf")).triu(1)
            turned = self._deeper.model.rotary_emb(x, position)
            y = self._deeper.model.layers[LAYERS](
                x, attention_mask=mask, position_ids=position, position_embeddings=turned
            )
            y = y[0] if isinstance(y, tuple) else y
            logits: torch.Tensor = self._model.lm_head(self._norm(y, "shared_head.norm"))[0, -1]
        return logits
