"""Time of the compiled CPU kernels beside the torch operators that they stand in for.

    python benchmarks/host_kernels.py [--json FILE]

One thread, the demo model's sizes, weights of eight layers in turn. CPU time of the process, the best of seven rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.attention_server.dense import DenseModel
from expertmesh.attention_server.host import MAX_TOKENS
from expertmesh.attention_server.paged import PagedKvCache
from expertmesh.attention_server.step_index import build_step_index
from expertmesh.kernels import grouped_mlp
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec

SLOTS, LAYERS, BLOCK_SIZE, CONTEXT = 11, 8, 16, 64


def best_us(function: Callable[[], object], calls: int = 100) -> float:
    function()
    rounds = []
    for _ in range(7):
        started_s = time.process_time()
        for _ in range(calls):
            function()
        rounds.append((time.process_time() - started_s) / calls)
    return round(1e6 * min(rounds), 1)


def expert_mlp(rows: int) -> dict[str, float]:
    """``grouped_expert_mlp`` on rows spread at random over the slots, through either path."""
    hidden, width = 256, 56
    gate_up, down = torch.randn(LAYERS, SLOTS, 2 * width, hidden), torch.randn(LAYERS, SLOTS, hidden, width)
    counts_S = torch.from_numpy(np.bincount(np.random.default_rng(0).integers(0, SLOTS, rows), minlength=SLOTS))
    rows_NH = torch.randn(rows, hidden)
    layers = itertools.cycle(range(LAYERS))

    def run() -> None:
        layer = next(layers)
        grouped_mlp.grouped_expert_mlp(rows_NH, counts_S, gate_up[layer], down[layer])

    limit = grouped_mlp.HOST_ROWS_SMALL
    grouped_mlp.HOST_ROWS_SMALL = 1 << 30
    compiled_us = best_us(run)
    grouped_mlp.HOST_ROWS_SMALL = 0
    torch_us = best_us(run)
    grouped_mlp.HOST_ROWS_SMALL = limit
    return {"rows": rows, "compiled_us": compiled_us, "torch_us": torch_us}


def decode_layers(tokens: int) -> dict[str, float]:
    """Attention and gate of all layers of the demo model, a token a sequence."""
    spec = load_spec(ModelConfig(dtype="float32"))
    blocks = -(-(CONTEXT + 1) // BLOCK_SIZE)
    cache = PagedKvCache(
        num_layers=spec.num_layers,
        num_blocks=tokens * blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
    )
    model = DenseModel(spec, Checkpoint(spec.path), cache)
    starts, ones = np.full(tokens, CONTEXT), np.ones(tokens, np.int64)
    blocks_SB = np.random.default_rng(0).permutation(tokens * blocks).reshape(tokens, blocks)
    x_TH = torch.randn(tokens, spec.hidden_size)

    def run(max_compiled_tokens: int) -> None:
        index = build_step_index(
            starts,
            ones,
            blocks_SB,
            block_size=BLOCK_SIZE,
            dtype=spec.dtype,
            max_compiled_tokens=max_compiled_tokens,
        )
        context = model.context(index)
        for layer in range(spec.num_layers):
            out_TH = model.attention(layer, x_TH.clone(), context)
            model.routed_input(layer, out_TH, compiled=max_compiled_tokens > 0)

    compiled_us, torch_us = best_us(lambda: run(MAX_TOKENS), 20), best_us(lambda: run(0), 20)
    return {"tokens": tokens, "compiled_us": compiled_us, "torch_us": torch_us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to a file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        result: dict[str, Any] = {
            "command": "python benchmarks/host_kernels.py",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "expert_mlp": [expert_mlp(rows) for rows in (3, 6, 12, 21, 42, 85, 170, 340)],
            "decode_attention_and_gate": [decode_layers(tokens) for tokens in (1, 4, 8, 16, 32)],
        }
    for name in ("expert_mlp", "decode_attention_and_gate"):
        print(name)
        for row in result[name]:
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
