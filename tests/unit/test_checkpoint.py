from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.model.tensors import INDEX_FILE, SINGLE_FILE
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


def test_demo_model_loads() -> None:
    spec = load_spec(ModelConfig())
    checkpoint = Checkpoint(spec.path)
    assert checkpoint.model_tensors(spec)["embed"].shape == (8192, 256)
    for layer in spec.moe_layers:
        assert checkpoint.layer_tensors(spec, layer)["router"].shape == (32, 256)
        assert all(torch.isfinite(weights).all() for weights in checkpoint.expert(spec, layer, layer))


def missing(path: Path) -> None:
    (path / SHARD).unlink()


def truncated(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[:-100])


def empty(path: Path) -> None:
    (path / SHARD).write_bytes(b"")


def cut_in_the_header(path: Path) -> None:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:200])


def header_is_no_json(path: Path) -> None:
    (path / SHARD).write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")


def header_entry_is_malformed(path: Path) -> None:
    (path / SHARD).write_bytes(b"\x0a\0\0\0\0\0\0\0" + b'{"x": {}} ')


def git_lfs_pointer(path: Path) -> None:
    (path / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def a_folder(path: Path) -> None:
    (path / SHARD).unlink()
    (path / SHARD).mkdir()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (missing, "is missing; the checkpoint is incomplete: fetch this shard"),
        (truncated, "is truncated"),
        (empty, "has no whole safetensors header"),
        (cut_in_the_header, "has no whole safetensors header"),
        (header_is_no_json, "header: is not valid JSON"),
        (header_entry_is_malformed, "has a malformed entry"),
        (git_lfs_pointer, "has no whole safetensors header"),
        (a_folder, "cannot be read"),
    ],
)
def test_damaged_shard(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    damage(path)
    for read in (lambda: Checkpoint(path), lambda: load_spec(ModelConfig(path=path))):
        with pytest.raises(UserError, match=problem) as caught:
            read()
        assert caught.value.key.startswith(str(path / SHARD))


@pytest.mark.parametrize("outside", ["../secret", "/etc/passwd", "a/../../b", "..\\x", "", "\0", "\ud800", "x" * 2000])
def test_index_that_leaves_the_folder(tmp_path: Path, outside: str) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    index = json.loads((path / INDEX_FILE).read_text())
    index["weight_map"][EMBED] = outside
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{INDEX_FILE}: weight_map: names .* outside the checkpoint folder"):
        Checkpoint(path)


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


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX_FILE])
def test_links_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to("../elsewhere")
    with pytest.raises(UserError, match=rf"{name}: is a link to {tmp_path}/elsewhere, outside the checkpoint folder"):
        load_spec(ModelConfig(path=path))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 3}}'])
def test_bad_index(tmp_path: Path, index: str) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    (path / INDEX_FILE).write_text(index)
    with pytest.raises(UserError, match=INDEX_FILE):
        Checkpoint(path)


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    index = json.loads((path / INDEX_FILE).read_text())
    index["weight_map"]["model.extra"] = SHARD
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"model\.extra: is not in .*{SHARD}"):
        Checkpoint(path)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    (path / SINGLE_FILE).rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds neither"):
        Checkpoint(path)


def test_wrong_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    checkpoint = Checkpoint(path)
    with pytest.raises(UserError, match=r"nothing: is not in the checkpoint"):
        checkpoint.tensor("nothing", (1,), torch.float32)
    with pytest.raises(UserError, match=rf"{EMBED}: has shape \[512, 64\] in .*, config\.json asks for \[512, 65\]"):
        checkpoint.tensor(EMBED, (512, 65), torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_dtype_that_is_not_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(path / SINGLE_FILE)
    save_file({**tensors, EMBED: tensors[EMBED].to(dtype)}, path / SINGLE_FILE)
    with pytest.raises(UserError, match=rf"{EMBED}: has dtype .*; use a checkpoint stored as one of F32, BF16, F16"):
        load_spec(ModelConfig(path=path))


def test_file_that_vanishes_after_start(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", shards=3)
    checkpoint = Checkpoint(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.tensor(EMBED, (512, 64), torch.float32)
