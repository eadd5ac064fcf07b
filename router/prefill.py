"""The mesh that computes prompts for this one: its view, the links to its attention servers, and who goes there."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.membership import MembershipClient
from expertmesh.router.generation import Generation
from expertmesh.router.links import AttentionLink
from expertmesh.router.pool import LinkPool
from expertmesh.v1 import attention_pb2, mesh_pb2

log = logging.getLogger(__name__)


class PrefillMesh:
    """Followed as the router follows its own mesh; without it prompts are computed where their tokens are generated.

    Args:
        registration: the router's, as it would tell its own balancer.
    """

    def __init__(
        self,
        config: MeshConfig,
        hello: attention_pb2.LinkHello,
        registration: Callable[[], mesh_pb2.Registration],
    ) -> None:
        settings = config.disaggregation
        assert settings.prefill_balancer is not None, "role decode has one"
        self._min_prompt_tokens = settings.min_prompt_tokens
        self._base_registration = registration
        self._server_id = f"{config.name}-{hello.router_id}"  # that mesh may have a router of our name
        self._incarnation = uuid.uuid4().hex
        self._view_number = 0
        self.pool = LinkPool(
            hello=hello,
            tls=config.tls,
            affinity_tokens=config.router.prefix_affinity_tokens,
            slack_tokens=config.router.prefix_affinity_slack_tokens,
            on_change=lambda: None,
        )
        self.membership = MembershipClient(
            settings.prefill_balancer, self._registration, self._on_message, config.tls, self._heartbeat
        )

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

    def _registration(self) -> mesh_pb2.Registration:
        registration = self._base_registration()
        registration.server_id = self._server_id
        registration.incarnation, registration.view_number = self._incarnation, self._view_number
        return registration

    def _heartbeat(self) -> mesh_pb2.Heartbeat:
        """Without the router's load: that is its own mesh's, and what was counted since the last one is told once."""
        state = mesh_pb2.SERVER_STATE_SERVING if self.pool.any_serving else mesh_pb2.SERVER_STATE_STARTING
        return mesh_pb2.Heartbeat(view_number=self._view_number, state=state)

    def _on_message(self, message: mesh_pb2.JoinResponse) -> None:
        match message.WhichOneof("message"):
            case "view":
                self._view_number = message.view.number
                self.pool.set_view(message.view)
            case "pause":
                self.pool.set_pause(message.pause.reason)
            case "fenced":
                log.warning("fenced by the balancer of the prefill mesh: %s", message.fenced.reason)
                self._incarnation = uuid.uuid4().hex
