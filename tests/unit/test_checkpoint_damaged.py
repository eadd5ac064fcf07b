"""Checkpoints that are damaged, lead elsewhere or differ from config.json: refused, by the file and the reason."""

from __future__ import annotations

import json
import os
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
from support.checkpoints import write_checkpoint

SHARD = "model-00002-of-00003.safetensors"
EMBED = "model.embed_tokens.weight"


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


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_file_that_is_cut_short_after_start(tmp_path: Path, out_dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    checkpoint = Checkpoint(path)
    last = max(checkpoint._index.entries.items(), key=lambda item: item[1].offset)
    name, shape = last[0], last[1].shape
    checkpoint.tensor(name, shape, out_dtype)
    os.truncate(path / SINGLE_FILE, (path / SINGLE_FILE).stat().st_size - 2)
    with pytest.raises(UserError, match=rf"{SINGLE_FILE}: cannot be read \(it ends at byte \d+\)"):
        checkpoint.tensor(name, shape, out_dtype)
