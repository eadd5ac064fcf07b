"""The model families that the mesh serves. A new one is a module beside this and a line in ``FAMILIES``."""

from __future__ import annotations

from expertmesh.mesh.model.families.base import Family
from expertmesh.mesh.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE
from expertmesh.mesh.model.families.dots1 import Dots1
from expertmesh.mesh.model.families.glm4_moe import Glm4Moe
from expertmesh.mesh.model.families.gpt_oss import GptOss
from expertmesh.mesh.model.families.granitemoe import GraniteMoe
from expertmesh.mesh.model.families.llama4 import LLAMA4, LLAMA4_TEXT
from expertmesh.mesh.model.families.minimax_m2 import MiniMaxM2
from expertmesh.mesh.model.families.mixtral import Mixtral
from expertmesh.mesh.model.families.olmoe import Olmoe
from expertmesh.mesh.model.families.qwen2_moe import Qwen2Moe
from expertmesh.mesh.model.families.qwen3_moe import Qwen3Moe
from expertmesh.mesh.model.fields import Fields

FAMILIES: tuple[Family, ...] = (
    Qwen3Moe(),
    Qwen2Moe(),
    Mixtral(),
    Olmoe(),
    GraniteMoe(),
    Glm4Moe(),
    Dots1(),
    GptOss(),
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE_LITE,
    MiniMaxM2(),
    LLAMA4_TEXT,
    LLAMA4,
)


def find_family(config: Fields) -> Family:
    """The family of a config.json, by ``architectures[0]``, or by ``model_type`` where that is missing.

    Raises:
        UserError: no family serves it; lists those that are served.
    """
    listed = config.data.get("architectures")
    wanted = listed[0] if isinstance(listed, list) and listed else None
    model_type = config.data.get("model_type")
    for family in FAMILIES:
        if wanted in family.architectures or (wanted is None and model_type == family.name):
            return family
    served = ", ".join(name for family in FAMILIES for name in family.architectures)
    key, value = ("model_type", model_type) if wanted is None else ("architectures", wanted)
    raise config.error(key, f"is {value!r}, which is not supported", f"use a model of one of: {served}")


def family_by_name(name: str) -> Family:
    """The family that ``ModelSpec.family`` names."""
    return next(family for family in FAMILIES if family.name == name)
