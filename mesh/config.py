"""``mesh.yaml``: every setting of a mesh, validated as a whole.

Names follow TensorRT-LLM and vLLM where they have one. Every option has a default under which ``expertmesh up`` works.
Secrets never stand here: only the files that hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from expertmesh.mesh.config_balancer import BalancerConfig as BalancerConfig
from expertmesh.mesh.config_balancer import EtcdConfig as EtcdConfig
from expertmesh.mesh.config_disaggregation import DisaggregationConfig
from expertmesh.mesh.config_errors import (
    DuplicateKeyError,
    describe_kind,
    describe_problems,
    describe_yaml_error,
    load_yaml,
)
from expertmesh.mesh.config_model import ModelConfig as ModelConfig
from expertmesh.mesh.config_ranks import AttentionConfig as AttentionConfig
from expertmesh.mesh.config_ranks import DataPlaneConfig as DataPlaneConfig
from expertmesh.mesh.config_ranks import ExpertConfig as ExpertConfig
from expertmesh.mesh.config_router import RouterConfig as RouterConfig
from expertmesh.mesh.config_scaling import RoleScaling, ScalingConfig
from expertmesh.mesh.config_section import Section
from expertmesh.mesh.config_security import ApiConfig as ApiConfig
from expertmesh.mesh.config_security import TlsConfig as TlsConfig
from expertmesh.mesh.config_speculation import SpeculationConfig
from expertmesh.mesh.config_telemetry import TelemetryConfig as TelemetryConfig
from expertmesh.mesh.errors import UserError, why_unreadable


class MeshConfig(Section):
    name: str = Field("mesh", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")
    node: str = Field("node-0", description="ranks of one node share fast links")
    both_servers: int = Field(0, ge=0, description="colocated ranks with an attention and an expert half")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what ranks compute on; auto = a GPU where the mesh is one rank and sees one, else the CPU"
    )
    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    attention: AttentionConfig = AttentionConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    disaggregation: DisaggregationConfig = DisaggregationConfig()
    expert: ExpertConfig = ExpertConfig()
    balancer: BalancerConfig = BalancerConfig()
    scaling: ScalingConfig = ScalingConfig()
    dataplane: DataPlaneConfig = DataPlaneConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    tls: TlsConfig = TlsConfig()
    api: ApiConfig = ApiConfig()

    @model_validator(mode="after")
    def _roles_are_covered(self) -> MeshConfig:
        if self.attention.servers + self.both_servers == 0:
            raise ValueError("attention.servers is 0 and both_servers is 0: the mesh needs at least one attention half")
        if self.expert.servers + self.both_servers == 0:
            raise ValueError("expert.servers is 0 and both_servers is 0: the mesh needs at least one expert half")
        return self

    @model_validator(mode="after")
    def _scaling_starts_within_its_bounds(self) -> MeshConfig:
        counts = {"attention": self.attention.servers, "expert": self.expert.servers, "both": self.both_servers}
        for role, count in counts.items():
            bounds: RoleScaling = getattr(self.scaling, role)
            if self.scaling.policy != "off" and count and not bounds.min_servers <= count <= bounds.max_servers:
                raise ValueError(
                    f"scaling.{role} allows {bounds.min_servers} to {bounds.max_servers} servers, and {count} are "
                    f"configured: the policy would start with a change, so set min_servers or max_servers to {count}"
                )
        return self

    def check_doors(self) -> None:
        """At the start of a service, which may have been told other hosts.

        Raises:
            UserError: API keys would cross a network in the clear.
        """
        has_tls = self.tls.cert_file is not None
        router, router_has_tls = self.router, has_tls or self.api.cert_file is not None
        self.api.check_door("router.host", router.host, has_tls=router_has_tls)
        if router.http.enabled:
            self.api.check_door("router.http.host", router.http.host or router.host, has_tls=router_has_tls)
        self.api.check_door("balancer.host", self.balancer.host, has_tls=has_tls)

    @property
    def door_tls(self) -> TlsConfig:
        """What the router's doors answer with: a certificate of their own, or as the other services."""
        if self.api.cert_file is None:
            return self.tls
        return TlsConfig(cert_file=self.api.cert_file, key_file=self.api.key_file)

    @model_validator(mode="after")
    def _replicas_have_servers(self) -> MeshConfig:
        wanted = self.expert.min_replicas
        if wanted > self.num_expert_ranks:
            raise ValueError(
                f"expert.min_replicas is {wanted}, more than the {self.num_expert_ranks} expert servers: "
                "a server never holds two replicas of an expert, so lower it or add servers"
            )
        if self.expert.num_hot_experts and self.num_expert_ranks < 2:
            raise ValueError("expert.num_hot_experts is set, and one expert server cannot hold two replicas: add one")
        return self

    @property
    def num_expert_ranks(self) -> int:
        return self.expert.servers + self.both_servers

    def slots_per_server(self, num_experts: int) -> int:
        """Slots a layer that one expert server has room for, given the model's experts a layer.

        Raises:
            UserError: the slots of all servers together cannot hold every expert, or ``num_slots``.
        """
        ranks, needed = self.num_expert_ranks, self.expert.min_slots(num_experts)
        num_slots = self.expert.num_slots if self.expert.num_slots is not None else needed
        if num_slots < num_experts:
            raise UserError(
                "expert.num_slots",
                f"{num_slots} slots cannot hold the model's {num_experts} experts a layer",
                f"set it to {num_experts} or more, or leave it out",
            )
        if num_slots < needed:
            raise UserError(
                "expert.num_slots",
                f"{num_slots} slots are fewer than the {needed} that {self.expert.replicas_wanted} takes with the "
                f"model's {num_experts} experts a layer",
                f"set it to {needed} or more, or leave it out",
            )
        if num_slots > num_experts * ranks:
            raise UserError(
                "expert.num_slots",
                f"{num_slots} slots are more than {num_experts} experts × {ranks} servers can use: "
                "a server never holds two replicas of an expert",
                f"set it to {num_experts * ranks} or less",
            )
        if self.expert.slots_per_server is None:
            survivors = max(1, ranks - 1)
            return min(num_experts, max(-(-num_slots // ranks), -(-min(needed, num_experts * survivors) // survivors)))
        if min(self.expert.slots_per_server, num_experts) * ranks < num_slots:
            key = "num_slots" if self.expert.num_slots is not None else self.expert.replicas_wanted
            raise UserError(
                "expert.slots_per_server",
                f"{self.expert.slots_per_server} slots × {ranks} servers hold fewer than the {num_slots} "
                f"that {key} takes",
                f"set it to {-(-num_slots // ranks)} or more, or add expert servers",
            )
        return self.expert.slots_per_server


def parse_config(data: Any, source: str = "mesh.yaml") -> MeshConfig:
    """Validate a loaded mapping; all problems come in one error.

    Raises:
        UserError: naming every wrong key with its value and what it may be.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(source, f"holds {describe_kind(data)}", "write a mapping of sections: model, router ...")
    try:
        return MeshConfig.model_validate(data)
    except ValidationError as error:
        problems = describe_problems(error, MeshConfig)
        raise UserError(source, problems, "see docs/configuration.md for every key") from None


def load_config(path: Path | None) -> MeshConfig:
    """Read ``mesh.yaml``; ``None`` gives the defaults.

    Raises:
        UserError: the file cannot be read, is not YAML, or a key is wrong.
    """
    if path is None:
        return MeshConfig()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            str(path), f"cannot be read ({why_unreadable(error)})", "give the path of a mesh.yaml"
        ) from None
    try:
        data = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(str(path), f"is not valid YAML ({describe_yaml_error(error)})", "mend the file") from None
    except DuplicateKeyError as error:
        raise UserError(str(path), str(error), "keep one of them") from None
    return parse_config(data, str(path))
