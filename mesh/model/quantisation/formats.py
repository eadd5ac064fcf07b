"""The formats of quantised weights that are read, and which a config.json asks for."""

from __future__ import annotations

from expertmesh.mesh.model.fields import Fields

FP8_BLOCK = 128
"""Rows and columns that share a scale, in DeepSeek-V3's FP8 checkpoints and those made like them."""

MXFP4_GROUP = 32
"""Numbers that share an exponent (OCP Microscaling Formats 1.0): 16 bytes of two each."""


def check_quantisation(config: Fields) -> None:
    """Refuse weights that are stored in another format.

    Raises:
        UserError: ``quantization_config`` names another method than FP8 in blocks of 128 × 128 or MXFP4.
    """
    if not config.has("quantization_config"):
        return
    section = config.section("quantization_config")
    method = section.string("quant_method", "unknown")
    if method == "mxfp4":
        return
    if method != "fp8":
        raise section.error(
            "quant_method", f"is {method!r}, which is not supported", "use the checkpoint in bfloat16, FP8 or MXFP4"
        )
    block = section.integers("weight_block_size")
    if block != (FP8_BLOCK, FP8_BLOCK):
        raise section.error("weight_block_size", f"is {list(block)}", f"it must be [{FP8_BLOCK}, {FP8_BLOCK}]")
    form = section.string("fmt", "e4m3")
    if form != "e4m3":
        raise section.error("fmt", f"is {form!r}, which is not supported", "use a checkpoint in e4m3")
