"""A mesh that a router follows: its balancer knows the router, the router its views and who serves in them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.membership import MembershipClient
from expertmesh.router.pool import LinkPool
from expertmesh.v1 import attention_pb2, mesh_pb2

log = logging.getLogger(__name__)


class FollowedMesh:
    """``membership`` is the caller's to run, ``pool`` to close.

    Args:
        balancer: ``HOST:PORT``, several with commas.
        describe: what the router says of itself there, but for its incarnation and view.
        on_change: called whenever ``pool.any_serving`` may have changed.
        complete: adds to a heartbeat what this balancer is to hear besides.
        on_drain: called with the reason when the balancer asks the router to drain.
    """

    def __init__(
        self,
        balancer: str,
        config: MeshConfig,
        hello: attention_pb2.LinkHello,
        describe: Callable[[], mesh_pb2.Registration],
        *,
        on_change: Callable[[], None] = lambda: None,
        complete: Callable[[mesh_pb2.Heartbeat], None] = lambda _: None,
        on_drain: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._balancer = balancer
        self._describe, self._complete, self._on_drain = describe, complete, on_drain
        self._incarnation = uuid.uuid4().hex
        self._view_number = 0
        self.pool = LinkPool(
            hello=hello,
            tls=config.tls,
            affinity_tokens=config.router.prefix_affinity_tokens,
            slack_tokens=config.router.prefix_affinity_slack_tokens,
            on_change=on_change,
        )
        self.membership = MembershipClient(balancer, self._registration, self._on_message, config.tls, self._heartbeat)

    def _registration(self) -> mesh_pb2.Registration:
        registration = self._describe()
        registration.incarnation, registration.view_number = self._incarnation, self._view_number
        return registration

    def _heartbeat(self) -> mesh_pb2.Heartbeat:
        state = mesh_pb2.SERVER_STATE_SERVING if self.pool.any_serving else mesh_pb2.SERVER_STATE_STARTING
        heartbeat = mesh_pb2.Heartbeat(view_number=self._view_number, state=state)
        self._complete(heartbeat)
        return heartbeat

    def _on_message(self, message: mesh_pb2.JoinResponse) -> None:
        match message.WhichOneof("message"):
            case "view":
                self._view_number = message.view.number
                self.pool.set_view(message.view)
            case "pause":
                self.pool.set_pause(message.pause.reason)
            case "fenced":
                reason = message.fenced.reason
                log.warning("fenced by the balancer %s: %s; coming back as a new server", self._balancer, reason)
                self._incarnation = uuid.uuid4().hex
            case "drain":
                self._on_drain(message.drain.reason)
