"""``balancer``: membership, placement, migration, and where its state is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from expertmesh.mesh.addresses import is_address, split_addresses
from expertmesh.mesh.config_section import Section


class EtcdConfig(Section):
    """Where ``balancer.state: etcd`` keeps what the balancers of one mesh share."""

    endpoints: tuple[str, ...] = Field(
        ("127.0.0.1:2379",), min_length=1, description="HOST:PORT of the cluster's members; tried in turn"
    )
    prefix: str = Field(
        "/expertmesh", pattern=r"^/.*[^/]$", description="every key is below it and the mesh's name: PREFIX/NAME/..."
    )
    lease_s: int = Field(
        2, ge=2, le=60, description="a leader that has not renewed its lease for so long is over; etcd grants no less"
    )
    user: str | None = Field(None, description="for an etcd that asks who one is")
    password_file: Path | None = Field(None, description="unset = the variable EXPERTMESH_ETCD_PASSWORD")
    ca_file: Path | None = Field(None, description="authority of etcd's certificate; with it the connection uses TLS")
    cert_file: Path | None = Field(None, description="with key_file: this client's certificate")
    key_file: Path | None = Field(None, description="of cert_file")

    @model_validator(mode="after")
    def _whole(self) -> EtcdConfig:
        for endpoint in self.endpoints:
            if not is_address(endpoint):
                raise ValueError(f"endpoints: {endpoint!r} is not HOST:PORT, such as 127.0.0.1:2379")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together: set both or neither")
        if self.cert_file is not None and self.ca_file is None:
            raise ValueError("cert_file is set and ca_file is not: name the authority of etcd's certificate")
        if self.password_file is not None and self.user is None:
            raise ValueError("password_file is set and user is not: set both or neither")
        return self


class BalancerConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    address: str | None = Field(
        None, description="where servers find it; unset = host:port; several balancers: HOST:PORT,HOST:PORT"
    )
    servers: int = Field(
        1, ge=1, le=9, description="balancers that `expertmesh up` starts: one leads, the others stand by (state: etcd)"
    )
    state: Literal["file", "etcd"] = Field(
        "file", description="where it keeps what it must not forget; etcd lets several balancers elect a leader"
    )
    state_dir: Path | None = Field(None, description="state `file`: its folder; unset = .expertmesh/<mesh name>")
    etcd: EtcdConfig = EtcdConfig()
    mode: Literal["static", "offline", "online"] = "static"
    policy: Literal["solver", "eplb"] = Field(
        "solver",
        description="what places experts: the mesh's own solver (load and co-activation), or DeepSeek's EPLB (load "
        "alone; it always places a layer afresh, so `max_slots_per_update` does not bind it)",
    )
    placement_file: Path | None = Field(None, description="what mode `offline` starts from")
    layer_updates_per_iter: int = Field(2, ge=0, description="layers that migrate at a time; 0 = as mode `static`")
    stats_interval_s: float = Field(2.0, gt=0, description="attention servers report routing statistics this often")
    stats_half_life_tokens: int = Field(
        20_000, ge=1, description="a token's weight in the statistics halves over so many"
    )
    max_slots_per_update: int = Field(8, ge=1, description="slots a layer that one migration may load")
    migration_bytes_per_s: int = Field(
        100_000_000,
        ge=1,
        description="weights that one expert server gives others for migrations, at most; one that would be late at "
        "this rate goes faster",
    )
    migration_transport: Literal["auto", "tcp", "nixl"] = Field(
        "auto",
        description="how weights go from one expert server to another: tcp through the memory of both hosts, nixl "
        "straight from one's slots into the other's (NVLink, RDMA; docs/gpu.md); auto = nixl on a GPU where it is "
        "installed, else tcp",
    )
    migration_timeout_s: float = Field(30.0, gt=0, description="a migration that is not staged by then is aborted")
    heartbeat_s: float = Field(0.5, gt=0)
    lease_s: float = Field(3.0, gt=0, description="silence after which a server counts as lost")
    formation_timeout_s: float = Field(
        60.0, gt=0, description="how long the first view waits for all configured servers before it takes what is there"
    )
    view_timeout_s: float = Field(30.0, gt=0, description="how long ranks may take to join a view")
    settle_s: float = Field(0.05, ge=0, description="membership changes within this time become one view")
    page_port: int | None = Field(
        None, ge=0, le=65535, description="a web page of the live mesh, on `host`; 0 = any; unset = off"
    )

    @model_validator(mode="after")
    def _lease_outlives_heartbeat(self) -> BalancerConfig:
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_s is {self.lease_s}, less than two heartbeats of {self.heartbeat_s} s: "
                "raise lease_s or lower heartbeat_s"
            )
        return self

    @model_validator(mode="after")
    def _balancers_share_state(self) -> BalancerConfig:
        for address in split_addresses(self.address or ""):
            if not is_address(address):
                raise ValueError(f"address: {address!r} is not HOST:PORT; write several as HOST:PORT,HOST:PORT")
        if self.servers > 1 and self.state == "file":
            raise ValueError(f"servers is {self.servers} and state is file, which has room for one: set state: etcd")
        return self
