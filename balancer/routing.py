"""What attention servers tell about routing, and what administrators ask of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable

from expertmesh.balancer.actual import LIVE, Actual
from expertmesh.balancer.loads import view_loads
from expertmesh.balancer.recording import Recordings
from expertmesh.balancer.statistics import Statistics
from expertmesh.v1 import admin_pb2, mesh_pb2

log = logging.getLogger(__name__)


class RoutingDesk:
    """Statistics and recordings of one mesh."""

    def __init__(
        self,
        actual: Actual,
        statistics: Statistics,
        send: Callable[[int, mesh_pb2.JoinResponse], None],
        clock: Callable[[], float],
    ) -> None:
        self._actual = actual
        self._statistics = statistics
        self._recordings = Recordings(actual, send, clock)

    @property
    def statistics_version(self) -> int:
        """Grows with every report that counts."""
        return self._statistics.version

    def receive(self, session: int, request: mesh_pb2.JoinRequest) -> None:
        """Any message of a stream but its first; those about something else are left alone."""
        kind = request.WhichOneof("message")
        if kind not in ("stats", "trace"):
            return
        member = self._actual.members.of_session(session)
        if member is None or not member.has_attention:
            return
        if kind == "trace":
            self._recordings.hear(member, request.trace)
            return
        try:
            self._statistics.merge(member.server_id, member.incarnation, request.stats, self._actual.model)
        except ValueError as error:
            log.warning("%s sent statistics that are not of this model: %s", member.server_id, error)

    def loads(self) -> admin_pb2.GetLoadsResponse:
        """Empty while there is no view."""
        if self._actual.phase not in LIVE:
            return admin_pb2.GetLoadsResponse()
        return view_loads(self._actual.view, self._actual.model.num_experts, self._statistics)

    def coactivation(self, layer: int) -> admin_pb2.GetCoactivationResponse:
        """Without pairs while nothing was counted.

        Raises:
            ValueError: it is no MoE layer of this model.
        """
        model = self._actual.model
        if layer not in model.moe_layers:
            raise ValueError(f"layer {layer} is no MoE layer of this model; it has {list(model.moe_layers)}")
        return admin_pb2.GetCoactivationResponse(
            layer=layer,
            num_experts=model.num_experts,
            tokens=self._statistics.tokens(layer),
            pairs=self._statistics.pairs(layer),
        )

    def record(self, request: admin_pb2.RecordRequest) -> AsyncGenerator[admin_pb2.RecordResponse]:
        """See ``Recordings.record``."""
        return self._recordings.record(request)
