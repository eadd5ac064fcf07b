"""FP8, MXFP4 and packed INT4/8 checkpoints: the loader's floats are those of an independent formula, bit for bit.

Each test takes a random checkpoint, quantises its weights by code of its own, and writes both the quantised folder and
one that holds, as plain floats, what the quantised numbers stand for.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from support import families

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def write_pair(
    path: Path, config: Mapping[str, object], quantise: Callable[[str, torch.Tensor], tuple[Tensors, Tensors]]
) -> tuple[Path, Path]:
    """The quantised folder and the plain one."""
    folders = path.parent / "quantised", path.parent / "plain"
    stored: tuple[Tensors, Tensors] = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for part, tensors in zip(quantise(name, tensor), stored, strict=True):
            tensors.update(part)
    for folder, tensors in zip(folders, stored, strict=True):
        folder.mkdir()
        shutil.copy(path / "config.json", folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folders[0] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folders


def fp8_pair(path: Path) -> tuple[Path, Path]:
    def quantise(name: str, tensor: torch.Tensor) -> tuple[Tensors, Tensors]:
        if not name.endswith("proj.weight") and "proj_with_mqa" not in name:
            return {name: tensor}, {name: tensor}
        rows, columns = tensor.shape
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        plain = torch.empty_like(tensor)
        scale = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale[i, j] = tensor[block].abs().max() / 448
                weight[block] = (tensor[block] / scale[i, j]).to(torch.float8_e4m3fn)
                plain[block] = weight[block].to(torch.float32) * scale[i, j]
        return {name: weight, f"{name}_scale_inv": scale}, {name: plain}

    return write_pair(path, FP8_CONFIG, quantise)


def mxfp4_pair(path: Path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)

    def quantise(name: str, tensor: torch.Tensor) -> tuple[Tensors, Tensors]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}, {name: tensor}
        count, inputs, outputs = tensor.shape
        code = torch.randint(0, 16, (count, outputs, inputs), generator=generator)
        scale = torch.randint(122, 126, (count, outputs, inputs // 32), generator=generator)
        plain = torch.tensor(E2M1)[code] * 2.0 ** (scale - 127).repeat_interleave(32, dim=-1)
        blocks = (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8).view(count, outputs, inputs // 32, 16)
        quantised = {f"{name}_blocks": blocks, f"{name}_scales": scale.to(torch.uint8)}
        return quantised, {name: plain.transpose(1, 2).contiguous()}

    return write_pair(path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, quantise)


def packed_pair(path: Path, num_bits: int, group: int) -> tuple[Path, Path]:
    def quantise(name: str, tensor: torch.Tensor) -> tuple[Tensors, Tensors]:
        if ".experts." not in name:
            return {name: tensor}, {name: tensor}
        rows, columns = tensor.shape
        half = 2 ** (num_bits - 1)
        groups = tensor.view(rows, columns // group, group)
        scale = (groups.abs().amax(-1) / half).to(torch.bfloat16)
        code = (groups / scale.float()[..., None]).round().clamp(-half, half - 1).to(torch.int64).view(rows, columns)
        words = torch.zeros(rows, math.ceil(columns * num_bits / 32), dtype=torch.int64)
        for column in range(columns):
            bit = column * num_bits
            words[:, bit // 32] |= (code[:, column] + half) << (bit % 32)
        plain = (code.view(groups.shape).float() * scale.float()[..., None]).view(rows, columns)
        quantised = {
            f"{name}_packed": words.to(torch.uint32).view(torch.int32),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        return quantised, {name: plain}

    weights = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return write_pair(path, config, quantise)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("quantised")
    latent = families.make_family_checkpoint(
        base / "fp8" / "model", "deepseek_v3", seed=1, hidden_size=144, intermediate_size=260, num_hidden_layers=2
    )
    sinks = families.make_family_checkpoint(
        base / "mxfp4" / "model", "gpt_oss", seed=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2
    )
    folders = {"fp8": fp8_pair(latent), "mxfp4": mxfp4_pair(sinks)}
    for num_bits, group in ((4, 4), (8, 20)):
        heads = families.make_family_checkpoint(
            base / f"int{num_bits}" / "model", "qwen2_moe", seed=3, hidden_size=40, moe_intermediate_size=20
        )
        folders[f"int{num_bits}"] = packed_pair(heads, num_bits, group)
    return folders


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "int4", "int8"])
def test_weights_are_those_of_an_independent_formula(folders: dict[str, tuple[Path, Path]], form: str) -> None:
    quantised, plain = folders[form]
    spec, same = load_spec(ModelConfig(path=quantised)), load_spec(ModelConfig(path=plain))
    ours, expected = Checkpoint(quantised), Checkpoint(plain)
    for layer in range(spec.num_layers):
        for part, tensor in expected.layer_tensors(same, layer).items():
            assert torch.equal(ours.layer_tensors(spec, layer)[part], tensor), part
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            pairs = zip(ours.expert(spec, layer, expert), expected.expert(same, layer, expert), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
            assert ours.expert_bytes(spec, layer, expert) < expected.expert_bytes(same, layer, expert) / 2


def test_mxfp4_weights_are_those_of_transformers(folders: dict[str, tuple[Path, Path]]) -> None:
    """FP8 it reads with accelerate and on a GPU only."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantised, plain = folders["mxfp4"]
    theirs = AutoModelForCausalLM.from_pretrained(
        quantised, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    expected = families.load_reference(plain)
    for (name, one), (_, other) in zip(theirs.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one.float(), other), name


def test_a_scale_of_another_shape_is_named(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    quantised, _ = folders["fp8"]
    broken = shutil.copytree(quantised, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, broken / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name}: has shape \[2, 1\] .* asks for \[2, 3\]"):
        load_spec(ModelConfig(path=broken))


def test_float8_without_scales_is_refused(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    quantised, _ = folders["fp8"]
    broken = shutil.copytree(quantised, tmp_path / "broken")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(broken / "model.safetensors")
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}: has dtype F8_E4M3 .*; use a checkpoint stored as one of F32"):
        load_spec(ModelConfig(path=broken))
