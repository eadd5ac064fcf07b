"""What each family makes of a config.json: sizes, variants, and a named refusal of what it does not serve."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.architecture import Architecture, Latent, Llama3Scaling, Span, YarnScaling
from expertmesh.mesh.model.families import FAMILIES, family_by_name
from expertmesh.mesh.model.fields import Fields
from support.families import FAMILIES as TINY
from support.families import SIZES

ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}


def read(name: str, **overrides: Any) -> Architecture:
    data = {**SIZES, **TINY[name], **ROPE, **overrides}
    return family_by_name(name).read(Fields(file="config.json", data=data))


@pytest.mark.parametrize(
    ("family", "key", "overrides"),
    [
        ("mixtral", "hidden_act", {"hidden_act": "gelu"}),
        ("mixtral", "sliding_window", {"sliding_window": 0}),
        ("mixtral", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("mixtral", "rope_parameters: rope_type", {"rope_parameters": {"rope_type": "longrope"}}),
        ("mixtral", "rope_scaling: factor", {"rope_scaling": {"rope_type": "yarn"}}),
        ("mixtral", "rope_scaling: factor", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}),
        ("mixtral", "num_experts_per_tok", {"num_experts_per_tok": 7}),
        ("mixtral", "num_key_value_heads", {"num_key_value_heads": 3}),
        ("olmoe", "head_dim", {"head_dim": 16}),
        ("qwen2_moe", "layer_types", {"use_sliding_window": True, "layer_types": ["full_attention"]}),
        ("qwen2_moe", "layer_types", {"use_sliding_window": True, "layer_types": ["linear_attention"] * 3}),
        ("qwen2_moe", "shared_expert_intermediate_size", {"shared_expert_intermediate_size": None}),
        ("granitemoe", "logits_scaling", {"logits_scaling": 0}),
        ("glm4_moe", "n_group", {"n_group": 3}),
        ("glm4_moe", "n_group", {"n_group": 8}),
        ("glm4_moe", "topk_group", {"topk_group": 5}),
        ("glm4_moe", "topk_group", {"topk_group": 1, "num_experts_per_tok": 3}),
        ("glm4_moe", "first_k_dense_replace", {"first_k_dense_replace": 3}),
        ("glm4_moe", "partial_rotary_factor", {"partial_rotary_factor": 0.2}),
        ("glm4_moe", "rope_theta", {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1}}),
        ("gpt_oss", "rope_scaling", {"rope_parameters": None}),
        ("gpt_oss", "layer_types", {"layer_types": ["chunked_attention"] * 3}),
        ("deepseek_v2", "topk_method", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", "norm_topk_prob", {"norm_topk_prob": True}),
        ("deepseek_v2", "moe_layer_freq", {"moe_layer_freq": 2}),
        ("deepseek_v3", "scoring_func", {"scoring_func": "softmax"}),
        ("deepseek_v3", "qk_rope_head_dim", {"qk_rope_head_dim": 7}),
        ("glm4_moe_lite", "mlp_layer_types", {"mlp_layer_types": ["dense"] * 3}),
        ("minimax_m2", "shared_intermediate_size", {"shared_intermediate_size": 8}),
        ("minimax_m2", "partial_rotary_factor", {"rotary_dim": 14}),
        ("llama4_text", "num_experts_per_tok", {"num_experts_per_tok": 2}),
        ("llama4_text", "no_rope_layers", {"no_rope_layers": [1]}),
        ("llama4_text", "interleave_moe_layer_step", {"moe_layers": [9]}),
        ("llama4_text", "quantization_config: quant_method", {"quantization_config": {"quant_method": "awq"}}),
    ],
)
def test_what_is_not_served_is_named(family: str, key: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        read(family, **overrides)
    assert caught.value.key == f"config.json: {key}"


def test_spans_of_each_layer() -> None:
    window = Span("window", 8)
    assert read("gpt_oss").attention.spans == (window, None, window)
    assert read("gpt_oss", layer_types=["full_attention"] * 3).attention.spans == ()
    assert read("mixtral", sliding_window=8).attention.spans == (window,) * 3
    assert read("qwen2_moe", sliding_window=8).attention.spans == ()
    assert read("dots1").attention.spans == (None, None, Span("window", 10))
    chunk = Span("chunk", 16)
    assert read("llama4_text").attention.spans == (chunk, None, chunk, None)
    assert read("llama4_text").attention.layers_without_rope == {1, 3}


def test_deepseek_compresses_what_it_caches() -> None:
    arch = read("deepseek_v3", rope_scaling=YARN)
    assert arch.attention.latent == Latent(q_rank=12, kv_rank=16, nope_dim=10, rope_dim=8, value_dim=14)
    assert arch.kv_values_per_token == 16 + 8
    # Both factors of YaRN cancel in the rotation and meet squared in the scale of the scores.
    assert isinstance(arch.rope.scaling, YarnScaling)
    assert arch.rope.scaling.attention_factor == 1.0
    assert arch.attention.scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(18))
    assert read("deepseek_v2", q_lora_rank=None).attention.latent == Latent(
        q_rank=None, kv_rank=16, nope_dim=10, rope_dim=8, value_dim=14
    )


def test_an_expert_with_biases_is_that_much_larger() -> None:
    arch = read("gpt_oss")
    assert arch.expert_shapes == ((80, 48), (48, 40), (80,), (48,))
    assert read("mixtral").expert_shapes == ((80, 48), (48, 40))


def test_llama3_scaling_may_have_no_middle() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    }
    assert isinstance(read("llama4_text", rope_scaling=scaling).rope.scaling, Llama3Scaling)


def test_llama4_with_vision_is_the_text_model_under_another_prefix() -> None:
    text, whole = family_by_name("llama4_text"), family_by_name("llama4")
    data = {**SIZES, **TINY["llama4_text"], **ROPE}
    arch = whole.read(Fields(file="config.json", data={"text_config": data, "vision_config": {}}))
    assert arch == text.read(Fields(file="config.json", data=data))
    for layer in range(arch.num_layers):
        expected = {part: f"language_model.{named.name}" for part, named in text.layer_tensors(arch, layer).items()}
        assert {part: named.name for part, named in whole.layer_tensors(arch, layer).items()} == expected
    fused = whole.fused_expert_tensors(arch, 0)
    assert fused is not None
    assert fused.gate_up.name == "language_model.model.layers.0.feed_forward.experts.gate_up_proj"


def test_no_two_families_claim_the_same_model() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(set(names)) == len(names)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_the_documented_example_is_the_module() -> None:
    root = Path(__file__).parents[2]
    module = (root / "mesh/model/families/dots1.py").read_text(encoding="utf-8")
    assert f"```python\n{module}```" in (root / "docs/adding-a-model.md").read_text(encoding="utf-8")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["yarn", "llama3", "sliding_attention"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "quant_method"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = sorted({*SIZES, *(key for tiny in TINY.values() for key in tiny), *ROPE, "rope_scaling", "layer_types"})


@pytest.mark.slow
@given(name=st.sampled_from(sorted(TINY)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_config_reads_or_is_refused(name: str, changes: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        arch = read(name, **{"num_hidden_layers": 4, **changes})
        family = family_by_name(name)
        for layer in range(min(arch.num_layers, 5)):
            assert family.layer_tensors(arch, layer)
        assert family.expert_tensors(arch, 0, 0) or family.fused_expert_tensors(arch, 0)
