"""An expert server: slots sized by the configuration, filled by the placement, computing what the data plane brings."""

from __future__ import annotations

from expertmesh.expert_server.slots import Slots
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.halves import ExpertHalf
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry


class ExpertServer:
    """Owns the expert half of a rank.

    Raises:
        UserError: the configured slots cannot hold the model's experts; see ``MeshConfig.slots_per_server``.
    """

    def __init__(self, config: MeshConfig, spec: ModelSpec, checkpoint: Checkpoint, telemetry: Telemetry) -> None:
        num_slots = config.slots_per_server(spec.num_experts)
        self.slots = Slots(
            spec,
            checkpoint,
            num_slots,
            telemetry.metrics.slots_loaded,
            layers_at_a_time=max(1, config.balancer.layer_updates_per_iter),
        )

    @property
    def half(self) -> ExpertHalf:
        return self.slots
