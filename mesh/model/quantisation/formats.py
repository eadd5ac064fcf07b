"""The formats of quantised weights that are read, and which a config.json asks for."""

from __future__ import annotations

from expertmesh.mesh.model.fields import Fields

FP8_BLOCK = 128
"""Rows and columns that share a scale, in DeepSeek-V3's FP8 checkpoints and those made like them."""

MXFP4_GROUP = 32
"""Numbers that share an exponent (OCP Microscaling Formats 1.0): 16 bytes of two each."""


INT_BITS, WORD_BITS = (4, 8), 32
"""What compressed-tensors packs weights into."""


def check_quantisation(config: Fields) -> None:
    """Refuse weights that are stored in another format.

    Raises:
        UserError: ``quantization_config`` names another method than FP8 in blocks of 128 × 128, MXFP4, or weights of 4
            or 8 bits packed by compressed-tensors.
    """
    if not config.has("quantization_config"):
        return
    section = config.section("quantization_config")
    method = section.string("quant_method", "unknown")
    if method == "fp8":
        _check_fp8(section)
    elif method == "compressed-tensors":
        _check_packed(section)
    elif method != "mxfp4":
        raise section.error(
            "quant_method", f"is {method!r}, which is not supported", "use the checkpoint in bfloat16, FP8 or MXFP4"
        )


def _check_fp8(section: Fields) -> None:
    block = section.integers("weight_block_size")
    if block != (FP8_BLOCK, FP8_BLOCK):
        raise section.error("weight_block_size", f"is {list(block)}", f"it must be [{FP8_BLOCK}, {FP8_BLOCK}]")
    form = section.string("fmt", "e4m3")
    if form not in ("e4m3", "float8_e4m3fn"):
        raise section.error("fmt", f"is {form!r}, which is not supported", "use a checkpoint in e4m3")


def _check_packed(section: Fields) -> None:
    form = section.string("format", "unknown")
    if form != "pack-quantized":
        raise section.error("format", f"is {form!r}, which is not supported", "use weights that are packed integers")
    groups = section.section("config_groups")
    for name in groups.data:
        group = groups.section(name)
        if group.has("input_activations"):
            raise group.error("input_activations", "is set", "use a checkpoint whose weights alone are quantised")
        weights = group.section("weights")
        bits = weights.integer("num_bits")
        if bits not in INT_BITS:
            raise weights.error("num_bits", f"is {bits}", "it may be 4 or 8")
        for key, allowed in (("type", "int"), ("symmetric", True), ("actorder", None)):
            value = weights.data.get(key, allowed)
            if value != allowed and not (key == "actorder" and value is False):
                raise weights.error(key, f"is {value!r}, which is not supported", f"use a checkpoint with {allowed}")
