from __future__ import annotations

import itertools
import json
import logging
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.attention_server.dense import DenseModel
from expertmesh.attention_server.paged import PagedKvCache
from expertmesh.expert_server.server import ExpertServer
from expertmesh.mesh.config import ModelConfig, parse_config
from expertmesh.mesh.model import checkpoint as checkpoint_module
from expertmesh.mesh.model import load_progress, reader
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.model.tensors import INDEX_FILE, SINGLE_FILE
from expertmesh.mesh.telemetry import disabled_telemetry
from support.checkpoints import fuse_experts, write_checkpoint

SHARD = "model-00002-of-00003.safetensors"
EMBED = "model.embed_tokens.weight"


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_equal_safetensors(tmp_path: Path, shards: int, stored: torch.dtype, dtype: str) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=shards, dtype=stored, attention_bias=True, mlp_only_layers=[1])
    spec = load_spec(ModelConfig.model_validate({"path": path, "dtype": dtype}))
    checkpoint, stored_tensors = Checkpoint(path), load_all(path)

    def same(tensor: torch.Tensor, *names: str) -> None:
        assert tensor.dtype == spec.dtype
        assert torch.equal(tensor, torch.cat([stored_tensors[name] for name in names]).to(spec.dtype))

    model = checkpoint.model_tensors(spec)
    same(model["embed"], EMBED)
    same(model["norm"], "model.norm.weight")
    same(model["lm_head"], "lm_head.weight")
    moe, dense = checkpoint.layer_tensors(spec, 0), checkpoint.layer_tensors(spec, 1)
    same(moe["q_proj"], "model.layers.0.self_attn.q_proj.weight")
    same(moe["o_bias"], "model.layers.0.self_attn.o_proj.bias")
    same(moe["router"], "model.layers.0.mlp.gate.weight")
    same(dense["down_proj"], "model.layers.1.mlp.down_proj.weight")
    assert "router" not in dense
    for expert in (0, 7):
        prefix = f"model.layers.2.mlp.experts.{expert}"
        gate_up, down = checkpoint.expert(spec, 2, expert)
        same(gate_up, f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        same(down, f"{prefix}.down_proj.weight")


def test_fused_experts_are_the_same_experts(tmp_path: Path) -> None:
    own, fused = write_checkpoint(tmp_path / "own"), write_checkpoint(tmp_path / "fused")
    fuse_experts(fused / SINGLE_FILE, 3, 8)
    spec = load_spec(ModelConfig(path=own))
    assert load_spec(ModelConfig(path=fused)).num_experts == 8
    for layer, expert in ((0, 0), (2, 7)):
        for one, other in zip(
            Checkpoint(own).expert(spec, layer, expert), Checkpoint(fused).expert(spec, layer, expert), strict=True
        ):
            assert torch.equal(one, other)


def test_tied_embeddings_have_no_lm_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head" not in Checkpoint(path).model_tensors(load_spec(ModelConfig(path=path)))


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", dtype=torch.float32)
    checkpoint = Checkpoint(path)
    before = checkpoint.tensor(EMBED, (512, 64), torch.float32)
    checkpoint.tensor(EMBED, (512, 64), torch.float32).zero_()
    assert torch.equal(checkpoint.tensor(EMBED, (512, 64), torch.float32), before)


def test_shards_that_are_links_as_in_hugging_faces_cache(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "models--a--b" / "snapshots" / "0123", shards=3)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for name in (SHARD, "config.json", INDEX_FILE):
        (path / name).rename(blobs / name)
        (path / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "model").symlink_to(path)
    spec = load_spec(ModelConfig(path=tmp_path / "model"))
    assert len(Checkpoint(spec.path).model_tensors(spec)) == 3


def test_demo_model_loads() -> None:
    spec = load_spec(ModelConfig())
    checkpoint = Checkpoint(spec.path)
    assert checkpoint.model_tensors(spec)["embed"].shape == (8192, 256)
    for layer in spec.moe_layers:
        assert checkpoint.layer_tensors(spec, layer)["router"].shape == (32, 256)
        assert all(torch.isfinite(weights).all() for weights in checkpoint.expert(spec, layer, layer))


def test_tensors_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(reader, "PIECE_BYTES", 100)
    embed = Checkpoint(path).tensor(EMBED, (512, 64), torch.float32)
    assert torch.equal(embed, load_file(path / SINGLE_FILE)[EMBED].float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_threads_read_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(checkpoint_module, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(checkpoint_module, "READERS", 3)  # 512 rows are no multiple of it
    spec, counted = load_spec(ModelConfig(path=path, dtype=dtype)), list[int]()
    embed = Checkpoint(path, counted.append).model_tensors(spec)["embed"]
    assert torch.equal(embed, load_file(path / SINGLE_FILE)[EMBED].to(embed.dtype))
    assert max(counted) == 171 * 64 * 2


def test_reads_that_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole_read = write_checkpoint(tmp_path / "tiny"), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole_read(fd, [buffers[0][:1000]], offset))
    counted: list[int] = []
    embed = Checkpoint(path, counted.append).tensor(EMBED, (512, 64), torch.bfloat16)
    assert torch.equal(embed, load_file(path / SINGLE_FILE)[EMBED])
    assert sum(counted) == 512 * 64 * 2
    assert max(counted) == 1000


class Reads:
    """Which bytes of which tensors the process has read from shards, by their headers and not by our index."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.num_bytes: dict[str, int] = {}
        preadv = os.preadv

        def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            count = preadv(descriptor, buffers, offset)
            self.note(Path(f"/proc/self/fd/{descriptor}").readlink(), offset, offset + count)
            return count

        monkeypatch.setattr(os, "preadv", read)

    def note(self, file: Path, begin: int, end: int) -> None:
        raw = file.read_bytes()
        data = 8 + struct.unpack("<Q", raw[:8])[0]
        for name, item in json.loads(raw[8:data]).items():
            if name != "__metadata__":
                first, last = (data + offset for offset in item["data_offsets"])
                overlap = min(end, last) - max(begin, first)
                if overlap > 0:
                    self.num_bytes[name] = self.num_bytes.get(name, 0) + overlap


@pytest.mark.parametrize("fused", [False, True])
def test_servers_read_what_they_need_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=1 if fused else 3)
    if fused:
        fuse_experts(path / SINGLE_FILE, 3, 8)
    spec, sizes = load_spec(ModelConfig(path=path)), {k: t.nbytes for k, t in load_all(path).items()}
    dense = {name: size for name, size in sizes.items() if ".experts." not in name}
    counted: list[int] = []
    checkpoint = Checkpoint(path, counted.append)

    reads = Reads(path, monkeypatch)
    config = parse_config({"expert": {"slots_per_server": 4}})
    slots = ExpertServer(config, spec, checkpoint, disabled_telemetry()).slots
    slots.load({layer: [5, -1, 7, 0] for layer in spec.moe_layers})
    expert = 3 * spec.moe_intermediate_size * spec.hidden_size * 2
    assert not dense.keys() & reads.num_bytes.keys()
    assert sum(reads.num_bytes.values()) == sum(counted) == 3 * len(spec.moe_layers) * expert
    assert checkpoint.expert_bytes(spec, 1, 5) == expert
    if not fused:
        held = {int(name.split(".")[5]) for name in reads.num_bytes}
        assert held == {0, 5, 7}

    reads.num_bytes.clear()
    cache = PagedKvCache(num_layers=3, num_blocks=2, block_size=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    DenseModel(spec, checkpoint, cache)
    assert reads.num_bytes == dense
    assert checkpoint.dense_bytes(spec) == sum(dense.values())


def test_progress_of_a_long_load(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count()
    progress = load_progress.LoadProgress("experts", 8 * 10**9, clock=lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        for _ in range(8):
            progress.add(10**9)
    assert [record.getMessage() for record in caplog.records] == ["loading experts: 62 % of 8.00 GB, 1.00 GB/s"]


def test_progress_counts_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    spec, checkpoint = load_spec(ModelConfig(path=path)), Checkpoint(path)
    monkeypatch.setattr(load_progress, "SAY_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), checkpoint.progress("dense weights", checkpoint.dense_bytes(spec)):
        checkpoint.model_tensors(spec)
        for layer in range(3):
            checkpoint.layer_tensors(spec, layer)
    # Readers log after they have counted, so that the last one to count may not be the last to log.
    assert any(record.getMessage().startswith("loading dense weights: 100 %") for record in caplog.records)
    caplog.clear()
    checkpoint.model_tensors(spec)
    assert not caplog.records


def test_tensors_that_nothing_uses_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    tensors = load_file(path / SINGLE_FILE)
    harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.3.eh_proj.weight", "mtp.fc.weight"]
    harmless += ["model.layers.0.self_attn.k_proj.k_scale", "lm_head.weight"]
    odd = [f"model.layers.1.self_attn.{name}" for name in ("a", "b", "c", "d", "e")]
    save_file({**tensors, **{name: torch.ones(1) for name in harmless + odd}}, path / SINGLE_FILE)
    spec = load_spec(ModelConfig(path=path))
    with caplog.at_level(logging.INFO):
        Checkpoint(path).log_unused(spec)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"uses {odd[0]}, {odd[1]}, {odd[2]} and 2 other tensors" in warning
    said = "; ".join(record.getMessage() for record in caplog.records if record.levelno == logging.INFO)
    assert "2 tensors are left out: multi-token prediction" in said
    assert said.count("1 tensors are left out") == 3


def test_tensors_beyond_the_index_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    Checkpoint(path).log_unused(load_spec(ModelConfig(path=path)))
    assert not caplog.records
    save_file({**load_file(path / SHARD), "stray": torch.ones(1)}, path / SHARD)
    Checkpoint(path).log_unused(load_spec(ModelConfig(path=path)))
    assert "no part of the model uses stray; check" in caplog.text


def test_a_tensor_in_two_shards_comes_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    other = "model-00003-of-00003.safetensors"
    weight_map = json.loads((path / INDEX_FILE).read_text())["weight_map"]
    name = next(name for name, shard in weight_map.items() if shard == SHARD)
    wanted = load_file(path / SHARD)[name]
    save_file({**load_file(path / other), name: torch.zeros_like(wanted)}, path / other)
    assert torch.equal(Checkpoint(path).tensor(name, tuple(wanted.shape), torch.bfloat16), wanted)


def test_code_that_a_checkpoint_names_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path / "tiny", auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)
    (path / "evil.py").write_text("raise SystemExit('ran')")
    with caplog.at_level(logging.INFO):
        load_spec(ModelConfig(path=path))
    assert "auto_map names code of the checkpoint, which is never run" in caplog.text
