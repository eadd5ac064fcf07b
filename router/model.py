"""The served model as a router knows it: names, limits and the tokenizer, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.spec import GenerationDefaults, ModelSpec, load_spec
from expertmesh.router.detokenizer import Vocabulary
from expertmesh.router.tokenizer import PromptTokenizer, load_tokenizer
from expertmesh.router.validation import ModelLimits, SamplingDefaults
from expertmesh.v1 import generate_pb2, mesh_pb2


@dataclass(frozen=True, kw_only=True)
class RouterModel:
    spec: ModelSpec
    limits: ModelLimits
    tokenizer: PromptTokenizer
    vocabulary: Vocabulary

    def info(self) -> generate_pb2.GetModelInfoResponse:
        spec, defaults = self.spec, self.limits.defaults
        return generate_pb2.GetModelInfoResponse(
            model=spec.name,
            family=spec.family,
            dtype=spec.dtype_name,
            max_model_len=spec.max_model_len,
            vocab_size=spec.vocab_size,
            num_layers=spec.num_layers,
            num_moe_layers=len(spec.moe_layers),
            num_experts=spec.num_experts,
            num_experts_per_token=spec.top_k,
            eos_token_ids=spec.eos_token_ids,
            default_sampling_params=generate_pb2.SamplingParams(
                temperature=defaults.temperature,
                top_p=defaults.top_p,
                top_k=defaults.top_k,
                min_p=defaults.min_p,
                repetition_penalty=defaults.repetition_penalty,
            ),
            fingerprint=spec.fingerprint,
            has_chat_template=self.tokenizer.chat_template is not None,
        )

    def shape(self) -> mesh_pb2.ModelShape:
        spec = self.spec
        return mesh_pb2.ModelShape(
            name=spec.name,
            family=spec.family,
            num_experts=spec.num_experts,
            moe_layers=spec.moe_layers,
            bytes_per_expert=spec.bytes_per_expert,
        )


def load_router_model(config: ModelConfig, *, mtp: bool = False) -> RouterModel:
    """Read the spec and the tokenizer; does not import torch.

    Args:
        mtp: as in ``load_spec``: servers and routers of a mesh agree on it.

    Raises:
        UserError: the checkpoint folder cannot be used.
    """
    spec = load_spec(config, mtp=mtp)
    tokenizer = load_tokenizer(spec.path, config.chat_template)
    limits = ModelLimits(
        name=spec.name,
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        defaults=_sampling_defaults(spec.generation),
    )
    return RouterModel(spec=spec, limits=limits, tokenizer=tokenizer, vocabulary=Vocabulary(tokenizer.tokenizer))


def _sampling_defaults(generation: GenerationDefaults) -> SamplingDefaults:
    return SamplingDefaults(
        temperature=generation.temperature if generation.do_sample else 0.0,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
    )
