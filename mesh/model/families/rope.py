"""Reads rotary embedding from config.json: transformers 5's ``rope_parameters`` or the older top-level keys."""

from __future__ import annotations

import math

from expertmesh.mesh.model.architecture import LinearScaling, Llama3Scaling, Rope, YarnScaling
from expertmesh.mesh.model.fields import Fields


def read_rope(
    config: Fields,
    width: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
) -> tuple[float, Rope]:
    """θ and the variant.

    Args:
        width: features of a head that may rotate.
        theta, partial: what transformers takes for this family where config.json says nothing; ``partial`` None = all
            features rotate in this family.
        interleaved: which features rotate together; see ``Rope``.

    Raises:
        UserError: a kind of scaling that is not supported, or a wrong value.
    """
    old = config.section("rope_scaling")
    section = old if old.data else config.section("rope_parameters")
    theta = section.number("rope_theta", config.number("rope_theta", theta))
    if theta <= 0:
        raise config.error("rope_theta", f"is {theta}", "it must be positive")
    dim = _rotating(config, section, width, partial)
    key = "rope_type" if section.has("rope_type") else "type"
    kind = section.string(key, "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        remedy = "use a model with default, linear, llama3 or yarn RoPE"
        raise section.error(key, f"is {kind!r}, which is not supported", remedy)
    if kind == "yarn" and theta <= 1:
        raise config.error("rope_theta", f"is {theta}", "it must be more than 1 with YaRN")
    scaling = _scaling(config, section, kind)
    return theta, Rope(dim=None if dim == width else dim, interleaved=interleaved, scaling=scaling)


def _rotating(config: Fields, section: Fields, width: int, partial: float | None) -> int:
    """How many of ``width`` features rotate."""
    holder = section if section.has("partial_rotary_factor") else config
    factor = holder.number("partial_rotary_factor", 1.0 if partial is None else partial)
    dim = int(width * factor)
    if partial is None and factor != 1.0:
        raise holder.error("partial_rotary_factor", "is not 1, which is not supported", "use a model with full RoPE")
    if not 0 < dim <= width or dim % 2 != 0:
        raise holder.error(
            "partial_rotary_factor", f"makes {dim} of {width} features rotate", "it must be an even number of them"
        )
    return dim


def _scaling(config: Fields, section: Fields, kind: str) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if kind == "default":
        return None
    factor = section.number("factor", minimum=1.0)
    if kind == "linear":
        return LinearScaling(factor=factor)
    max_len = config.integer("max_position_embeddings")
    trained = section.integer("original_max_position_embeddings", max_len)
    trained = config.integer("original_max_position_embeddings", trained)
    if kind == "llama3":
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if not 0 < low <= high:
            raise section.error("high_freq_factor", f"is {high}", f"it must not be below low_freq_factor = {low}")
        return Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_len=trained)
    return YarnScaling(
        factor=factor,
        original_max_len=trained,
        attention_factor=_attention_factor(section, factor),
        # As in transformers, 0 means the default.
        beta_fast=section.number("beta_fast", 32.0) or 32.0,
        beta_slow=section.number("beta_slow", 1.0) or 1.0,
        truncate=section.boolean("truncate", True),
    )


def _attention_factor(section: Fields, factor: float) -> float:
    if section.has("attention_factor"):
        return section.number("attention_factor")
    mscale, all_dim = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    if mscale and all_dim:
        return yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
    return yarn_scale(factor)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by, so that scores keep their spread over a longer context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
