"""A rank's weights from a checkpoint's files into a GPU, beside the rate at which the machine reads these files.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/load_weights.py --out benchmarks/results/gpu_load.json

Random weights of Qwen3-30B-A3B's shape, ``--layers`` of its 48, in shards of a layer each, are written, forgotten by
the page cache, and read: ``read`` with plain reads into memory by as many threads as a rank has, ``load`` by the expert
and the attention half of a rank, ``load again`` from the page cache. GB/s of the files' bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch
from decode import QWEN3_30B_A3B
from safetensors.torch import save_file

from expertmesh.attention_server.gpu_model import GpuModel
from expertmesh.expert_server.gpu_slots import GpuSlots
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import READERS, Checkpoint
from expertmesh.mesh.model.families import family_by_name
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.telemetry import disabled_telemetry

_READ_BYTES = 16 << 20
_INDEX = "model.safetensors.index.json"


def write_checkpoint(folder: Path, spec: ModelSpec) -> None:
    family, places = family_by_name(spec.family), {}
    for layer in range(-1, spec.num_layers):
        named = list((family.model_tensors(spec) if layer < 0 else family.layer_tensors(spec, layer)).values())
        for expert in range(spec.num_experts if layer >= 0 else 0):
            own = family.expert_tensors(spec, layer, expert)
            assert own is not None, "this family's experts have tensors of their own"
            named += own.all
        # The same numbers everywhere: what they are does not matter, and drawing them would take minutes.
        drawn = torch.randn(max(torch.Size(tensor.shape).numel() for tensor in named)).to(torch.bfloat16)
        tensors = {t.name: drawn[: torch.Size(t.shape).numel()].view(t.shape).clone() for t in named}
        shard = f"layer{layer + 1:03}.safetensors"
        save_file(tensors, folder / shard)
        places |= dict.fromkeys(tensors, shard)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for shard in shards(folder):
        descriptor = os.open(shard, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(folder: Path) -> None:
    def read(shard: Path) -> None:
        into = bytearray(_READ_BYTES)
        with shard.open("rb", buffering=0) as file:
            while file.readinto(into):
                pass

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, shards(folder)))


def load(folder: Path, spec: ModelSpec, device: torch.device) -> float:
    """Seconds; memory is allocated before."""
    checkpoint = Checkpoint(folder, lambda num_bytes: None)
    loaded = disabled_telemetry().metrics.slots_loaded
    slots = GpuSlots(spec, checkpoint, spec.num_experts, loaded, device, spare=1)
    began = time.perf_counter()
    slots.load({layer: range(spec.num_experts) for layer in spec.moe_layers})
    GpuModel(spec, checkpoint, device, num_rows=1, max_decodes=1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary files' one")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        folder = Path(made)
        (folder / "config.json").write_text(json.dumps({**QWEN3_30B_A3B, "num_hidden_layers": arguments.layers}))
        spec = load_spec(ModelConfig(path=folder, dtype="bfloat16", load_format="dummy", max_model_len=4096))
        write_checkpoint(folder, spec)
        gigabytes = sum(shard.stat().st_size for shard in shards(folder)) / 1e9
        for way in ("read", "load", "load again"):
            if way != "load again":
                forget(folder)
            began = time.perf_counter()
            if way == "read":
                read_all(folder)
                seconds = time.perf_counter() - began
            else:
                seconds = load(folder, spec, torch.device(arguments.device))
            rows.append({"way": way, "layers": arguments.layers, "gigabytes": round(gigabytes, 2),
                         "seconds": round(seconds, 2), "gb_per_s": round(gigabytes / seconds, 2)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            measure.write(arguments.out, {}, rows)


if __name__ == "__main__":
    main()
