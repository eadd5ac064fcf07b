from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.model.families import find_family
from expertmesh.mesh.model.families.qwen3_moe import Qwen3Moe
from expertmesh.mesh.model.fields import Fields
from expertmesh.mesh.model.spec import GenerationDefaults, load_spec
from support.checkpoints import TINY, write_checkpoint

PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def read(**overrides: Any) -> Any:
    return Qwen3Moe().read(Fields(file="config.json", data={**TINY, **overrides}))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_demo_model() -> None:
    spec = load_spec(ModelConfig())
    assert (spec.name, spec.family, spec.path) == ("expertmesh-demo", "qwen3_moe", demo_model_path())
    assert (spec.num_layers, spec.num_experts, spec.top_k, spec.head_dim) == (8, 32, 4, 64)
    assert spec.moe_layers == tuple(range(8))
    assert (spec.max_model_len, spec.eos_token_ids) == (1024, (0,))
    assert spec.generation == GenerationDefaults(do_sample=True, temperature=0.7, top_p=0.9)
    assert (spec.dtype, spec.bytes_per_expert) == (torch.float32, 3 * 256 * 56 * 4)


@pytest.mark.slow
def test_reading_a_spec_does_not_import_torch() -> None:
    code = (
        "import sys; from expertmesh.mesh.config import ModelConfig; from expertmesh.mesh.model.spec import load_spec;"
        "load_spec(ModelConfig()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_name_dtype_and_length_come_from_the_configuration(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    assert load_spec(ModelConfig(path=path)).name == "tiny"
    spec = load_spec(ModelConfig(path=path, name="mine", dtype="bfloat16", max_model_len=100))
    assert (spec.name, spec.dtype, spec.max_model_len) == ("mine", torch.bfloat16, 100)
    with pytest.raises(UserError, match=r"model\.max_model_len: 257 is more than .* 256"):
        load_spec(ModelConfig(path=path, max_model_len=257))


def test_without_generation_config_greedy(tmp_path: Path) -> None:
    spec = load_spec(ModelConfig(path=write_checkpoint(tmp_path / "tiny", eos_token_id=[3, 5])))
    assert spec.generation == GenerationDefaults()
    assert not spec.generation.do_sample
    assert spec.eos_token_ids == (3, 5)


def test_generation_config_decides_about_the_end(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", eos_token_id=3)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "top_k": 20, "top_p": None}))
    spec = load_spec(ModelConfig(path=path))
    assert spec.eos_token_ids == (7, 8)
    assert spec.generation == GenerationDefaults(top_k=20)


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_p", 0), ("top_p", 1.5), ("temperature", -1), ("temperature", "warm"), ("do_sample", 1), ("top_k", -1),
     ("repetition_penalty", 0), ("eos_token_id", "</s>")],
)  # fmt: skip
def test_bad_generation_config(tmp_path: Path, key: str, value: Any) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    (path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=rf"generation_config\.json: {key}: is "):
        load_spec(ModelConfig(path=path))


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        ({}, (0, 1, 2)),
        ({"decoder_sparse_step": 2}, (1,)),
        ({"mlp_only_layers": [1]}, (0, 2)),
        ({"mlp_only_layers": None, "decoder_sparse_step": 3}, (2,)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2, "num_hidden_layers": 4}, (3,)),
    ],
)
def test_moe_layers(overrides: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert read(**overrides).moe_layers == layers


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 3000}, 3000.0),
    ],
)
def test_rope_theta_old_and_new(rope: dict[str, Any], theta: float) -> None:
    assert read(**rope).rope_theta == theta


def test_defaults_are_those_of_transformers() -> None:
    optional = ("norm_topk_prob", "tie_word_embeddings", "decoder_sparse_step", "mlp_only_layers", "head_dim")
    arch = read(**dict.fromkeys(optional))
    assert (arch.norm_topk_prob, arch.tie_word_embeddings, arch.attention_bias) == (False, False, False)
    assert (arch.head_dim, arch.eos_token_ids, arch.rms_norm_eps) == (16, (), 1e-6)


def test_num_local_experts_is_num_experts() -> None:
    assert read(num_experts=None, num_local_experts=6).num_experts == 6


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("hidden_act", {"hidden_act": "gelu"}),
        ("use_sliding_window", {"use_sliding_window": True, "sliding_window": 128}),
        ("quantization_config: quant_method", {"quantization_config": {"quant_method": "gptq"}}),
        ("quantization_config: weight_block_size", {"quantization_config": {"quant_method": "fp8"}}),
        ("quantization_config: format", {"quantization_config": {**PACKED, "format": "int-quantized"}}),
        (
            "quantization_config: config_groups: g: weights: symmetric",
            {
                "quantization_config": {
                    **PACKED,
                    "config_groups": {"g": {"weights": {"num_bits": 4, "symmetric": False}}},
                }
            },
        ),
        (
            "quantization_config: config_groups: g: input_activations",
            {"quantization_config": {**PACKED, "config_groups": {"g": {"input_activations": {"num_bits": 8}}}}},
        ),
        ("quantization_config: fmt", {"quantization_config": {**FP8, "fmt": "e5m2"}}),
        ("rope_parameters: rope_type", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}),
        ("rope_scaling: type", {"rope_scaling": {"type": "linear-ish", "factor": 2.0}}),
        ("rope_scaling: rope_type", {"rope_scaling": {"rope_type": "dynamic"}}),
        ("rope_parameters", {"rope_parameters": 3}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_theta", {"rope_theta": 0}),
        ("num_experts", {"num_local_experts": 9}),
        ("num_experts", {"num_experts": None}),
        ("num_experts_per_tok", {"num_experts_per_tok": 9}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 15}),
        ("hidden_size", {"hidden_size": "big"}),
        ("hidden_size", {"hidden_size": True}),
        ("vocab_size", {"vocab_size": 0}),
        ("norm_topk_prob", {"norm_topk_prob": 1}),
        ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
        ("mlp_only_layers", {"mlp_only_layers": ["0"]}),
        ("decoder_sparse_step", {"decoder_sparse_step": 4}),
        ("decoder_sparse_step", {"mlp_only_layers": [0, 1, 2]}),
        ("moe_intermediate_size", {"moe_intermediate_size": None}),
    ],
)
def test_unsupported_or_wrong_config_names_the_key(key: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        read(**overrides)
    assert caught.value.key == f"config.json: {key}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({*TINY, "rope_parameters", "rope_scaling", "rope_theta", "num_local_experts", "quantization_config"})


@pytest.mark.slow
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_config_reads_or_is_refused(changes: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        assert read(**changes).moe_layers


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "model_type": "qwen3_moe"},
        {"model_type": "llama"},
        {},
        {"architectures": [3]},
        {"architectures": "x"},
    ],
)
def test_unsupported_architecture_lists_the_supported(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not supported; use a model of one of: Qwen3MoeForCausalLM, "):
        find_family(Fields(file="config.json", data=config))


def test_model_type_stands_in_for_architectures() -> None:
    assert find_family(Fields(file="config.json", data={"model_type": "qwen3_moe"})).name == "qwen3_moe"


def test_fingerprint_follows_what_it_should(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a")
    first = load_spec(ModelConfig(path=path)).fingerprint
    assert load_spec(ModelConfig(path=write_checkpoint(tmp_path / "b"), name="other")).fingerprint == first
    others = {
        load_spec(ModelConfig(path=path, dtype="bfloat16")).fingerprint,
        load_spec(ModelConfig(path=write_checkpoint(tmp_path / "c", dtype=torch.float32))).fingerprint,
        load_spec(ModelConfig(path=write_checkpoint(tmp_path / "d", rms_norm_eps=1e-5))).fingerprint,
        load_spec(ModelConfig(path=write_checkpoint(tmp_path / "e", vocab_size=600))).fingerprint,
    }
    assert len(others | {first}) == 5


def test_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: .* is not a folder"):
        load_spec(ModelConfig(path=tmp_path / "absent"))
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_spec(ModelConfig(path=tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff\xfe", "[" * 100_000])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    (path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json: (is not valid JSON|holds a JSON list)"):
        load_spec(ModelConfig(path=path))


def test_config_of_another_size_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    edit_config(path, moe_intermediate_size=32)
    with pytest.raises(UserError, match=r"experts\.0\.gate_proj\.weight: has shape \[24, 64\] .* asks for \[32, 64\]"):
        load_spec(ModelConfig(path=path))
    edit_config(path, moe_intermediate_size=24, num_hidden_layers=4)
    with pytest.raises(UserError, match=r"model\.layers\.3\.\S+: is not in the checkpoint"):
        load_spec(ModelConfig(path=path))
