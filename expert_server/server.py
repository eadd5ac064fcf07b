"""An expert server: slots sized by the configuration, filled by the placement, computing what the data plane brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.expert_server.slots import Slots
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.device import CPU
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import ExpertHalf
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry

if TYPE_CHECKING:
    from expertmesh.expert_server.gpu_slots import GpuSlots


class ExpertServer:
    """Owns the expert half of a rank.

    Raises:
        UserError: the configured slots cannot hold the model's experts; see ``MeshConfig.slots_per_server``; or
            ``expert.fp8`` is not for this device or checkpoint.
    """

    def __init__(
        self,
        config: MeshConfig,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        telemetry: Telemetry,
        device: torch.device = CPU,
    ) -> None:
        num_slots, loaded = config.slots_per_server(spec.num_experts), telemetry.metrics.slots_loaded
        layers = max(1, config.balancer.layer_updates_per_iter)
        self.slots: Slots | GpuSlots
        if device.type == "cpu":
            if config.expert.fp8 != "off":
                raise UserError(
                    "expert.fp8",
                    f"is {config.expert.fp8}, and experts are on the CPU",
                    "set device: cuda, or expert.fp8: off",
                )
            self.slots = Slots(spec, checkpoint, num_slots, loaded, layers_at_a_time=layers)
            return
        # Imported here: Triton, which it needs, is there only where a GPU is.
        from expertmesh.expert_server.gpu_slots import GpuSlots

        is_bounded = config.balancer.policy == "solver"
        spare = layers * (min(num_slots, config.balancer.max_slots_per_update) if is_bounded else num_slots)
        self.slots = GpuSlots(spec, checkpoint, num_slots, loaded, device, spare=spare, fp8=config.expert.fp8)

    @property
    def half(self) -> ExpertHalf:
        return self.slots
