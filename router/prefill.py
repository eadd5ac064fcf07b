"""The mesh that computes prompts for this one, and who goes there."""

from __future__ import annotations

from collections.abc import Callable

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.identity import guest_id
from expertmesh.router.following import FollowedMesh
from expertmesh.router.generation import Generation
from expertmesh.router.links import AttentionLink
from expertmesh.v1 import attention_pb2, mesh_pb2


class PrefillMesh(FollowedMesh):
    """Followed as the router follows its own mesh; without it prompts are computed where their tokens are generated.

    Its balancer hears nothing of the router's load: that is its own mesh's, and what was counted since the last
    heartbeat is told once.

    Args:
        describe: what the router says of itself to its own balancer.
    """

    def __init__(
        self, config: MeshConfig, hello: attention_pb2.LinkHello, describe: Callable[[], mesh_pb2.Registration]
    ) -> None:
        settings = config.disaggregation
        assert settings.prefill_balancer is not None, "role decode has one"
        self._min_prompt_tokens = settings.min_prompt_tokens

        def describe_guest() -> mesh_pb2.Registration:
            registration = describe()
            registration.server_id = guest_id(registration.server_id, config.name)
            return registration

        super().__init__(settings.prefill_balancer, config, hello, describe_guest)

    def choose(self, generation: Generation) -> AttentionLink | None:
        """Where to compute a prompt; None = where its tokens will be generated.

        A prompt comes here once: if its server is lost or too busy, the other mesh computes it.
        """
        if generation.was_prefilling or generation.output_token_ids or generation.sampling.max_tokens == 1:
            return None
        if len(generation.prompt_token_ids) < self._min_prompt_tokens:
            return None
        link = self.pool.choose(generation.prompt_token_ids)
        return link if link is not None and link.kv_source is not None else None
