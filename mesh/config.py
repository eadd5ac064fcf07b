"""``mesh.yaml``: every setting of a mesh, validated as a whole.

Names follow TensorRT-LLM and vLLM where they have one. Every option has a default under which ``expertmesh up`` works.
Secrets never stand here: only the files that hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from expertmesh.mesh.addresses import is_address, split_addresses
from expertmesh.mesh.config_disaggregation import DisaggregationConfig
from expertmesh.mesh.config_http import HttpConfig
from expertmesh.mesh.config_scaling import RoleScaling, ScalingConfig
from expertmesh.mesh.config_section import Section
from expertmesh.mesh.config_security import ApiConfig as ApiConfig
from expertmesh.mesh.config_security import TlsConfig as TlsConfig
from expertmesh.mesh.config_speculation import SpeculationConfig
from expertmesh.mesh.config_telemetry import TelemetryConfig as TelemetryConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.hub import REPO_PATTERN


class ModelConfig(Section):
    path: Path | None = Field(None, description="Hugging Face folder; unset = the demo model that the repository ships")
    repo: str | None = Field(
        None,
        pattern=REPO_PATTERN,
        description="instead of path: ORGANISATION/NAME on the Hugging Face hub, fetched into its cache",
    )
    revision: str | None = Field(None, min_length=1, description="of repo: a commit, tag or branch; unset = main")
    name: str | None = Field(None, description="name that clients may ask for; unset = repo, or the folder's name")
    chat_template: Path | None = Field(
        None, description="a file of Jinja; unset = the checkpoint's own, where it has one"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights, activations and KV cache")
    max_model_len: int | None = Field(None, ge=2, description="prompt + output tokens; unset = the checkpoint's")
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="auto = safetensors files; dummy = random weights, for benchmarks: the folder then needs no more "
        "than config.json, and a tokenizer where text is asked for",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None and self.repo is not None:
            raise ValueError("path and repo are both set: leave one out")
        if self.revision is not None and self.repo is None:
            raise ValueError("revision is set and repo is not: a folder has no revisions")
        return self


class RouterConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="0 = any free port")
    max_queued_requests: int = Field(4096, ge=1, description="admitted and not finished; beyond it RESOURCE_EXHAUSTED")
    max_requests_per_tenant: int = Field(2048, ge=1)
    max_prompt_bytes: int = Field(4 * 2**20, ge=1024, description="a longer prompt is refused before it is tokenised")
    max_message_bytes: int = Field(
        64 * 2**20, ge=2**20, description="a larger request is refused by gRPC itself, which cannot say what to change"
    )
    client_stall_timeout_s: float = Field(60.0, gt=0, description="a client that reads nothing for so long is dropped")
    prefix_affinity_tokens: int = Field(
        64, ge=0, description="prompts that share so many first tokens prefer the same attention server; 0 = off"
    )
    prefix_affinity_slack_tokens: int = Field(
        512, ge=0, description="outstanding tokens by which the preferred server may exceed the least loaded one"
    )
    replay_attempts: int = Field(3, ge=0, description="attention servers that one request may lose")
    no_capacity_timeout_s: float = Field(
        30.0, gt=0, description="how long a request without a deadline waits for a mesh that serves"
    )
    http: HttpConfig = HttpConfig()
    vllm_grpc: bool = Field(
        False, description="serve vllm.grpc.engine.VllmEngine on the same port as well; needs the extra `vllm-grpc`"
    )


class AttentionConfig(Section):
    servers: int = Field(2, ge=0)
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="where an attention or a colocated server serves gRPC: its health, routers; 0 = any free port",
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens in a KV block")
    num_kv_blocks: int | None = Field(None, ge=2, description="a server; unset = kv_cache_bytes / bytes of a block")
    kv_cache_bytes: int | None = Field(
        None, ge=2**16, description="a server; unset = 256 MiB, on a GPU free_gpu_memory_fraction of what is free"
    )
    free_gpu_memory_fraction: float = Field(
        0.85, gt=0, lt=1, description="of the GPU memory that weights leave, the share of the KV cache"
    )
    max_num_seqs: int = Field(256, ge=1, description="sequences in one step of a server")
    max_num_batched_tokens: int = Field(512, ge=1, description="tokens in one step of a server")
    max_waiting: int = Field(8192, ge=1, description="sequences waiting on one server; beyond it RESOURCE_EXHAUSTED")
    enable_prefix_caching: bool = True
    num_threads: int = Field(1, ge=1, description="torch threads of a server on the CPU")


class ExpertConfig(Section):
    servers: int = Field(3, ge=0)
    port: int = Field(
        0, ge=0, le=65535, description="where an expert server serves gRPC: its health; 0 = any free port"
    )
    num_slots: int | None = Field(
        None,
        ge=1,
        description="slots a layer that hold an expert, over all servers; unset = the model's experts, and in mode "
        "`online` replicas in the rest of the room where they pay",
    )
    slots_per_server: int | None = Field(
        None,
        ge=1,
        le=256,
        description="slots a layer that one server has room for; unset = enough that the mesh outlives one server",
    )
    min_replicas: int = Field(
        1,
        ge=1,
        description="slots that hold each expert, on as many servers, as far as there is room: with 2 the mesh loses a "
        "server without reading weights; what a lost server took is made up for in the background",
    )
    num_hot_experts: int = Field(
        0,
        ge=0,
        description="so many experts of a layer, those with most load, have two replicas at least; loads are known in "
        "mode `online`",
    )
    num_threads: int = Field(1, ge=1)
    fp8: Literal["off", "weights", "activations"] = Field(
        "off",
        description="experts of an FP8 checkpoint on GPUs: off = turned into the model's dtype; weights = kept as "
        "float8 with their scales, half the memory; activations = what they multiply is rounded to float8 too",
    )

    @property
    def replicas_wanted(self) -> str:
        """Which key asks for replicas, and for how many: for messages."""
        if self.min_replicas > 1 or not self.num_hot_experts:
            return f"min_replicas = {self.min_replicas}"
        return f"num_hot_experts = {self.num_hot_experts}"

    def min_slots(self, num_experts: int) -> int:
        """Slots a layer that ``min_replicas`` and ``num_hot_experts`` take."""
        hot = 0 if self.min_replicas > 1 else min(self.num_hot_experts, num_experts)
        return num_experts * self.min_replicas + hot


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
        description="weights that one expert server sends to others for migrations, at most; one that would be late at "
        "this rate goes faster",
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


class DataPlaneConfig(Section):
    backend: Literal["auto", "deepep", "nccl", "tcp", "gloo"] = Field(
        "auto", description="auto = tcp on CPUs; on GPUs deepep where every rank can use it, or else nccl"
    )
    interface_host: str = Field("127.0.0.1", description="address of the interface that the data plane binds to")
    port: int = Field(0, ge=0, le=65535, description="where the other ranks call a rank; 0 = any free port")
    max_num_tokens: int = Field(512, ge=1, description="tokens of one rank in one exchange; longer batches are split")
    timeout_s: float = Field(5.0, gt=0, description="a peer silent for so long within a step breaks the view")
    idle_tick_s: float = Field(0.5, gt=0, description="an empty step this often while nobody has work")
    num_sms: int | None = Field(
        None,
        ge=2,
        multiple_of=2,
        description="multiprocessors of a GPU that a deepep exchange takes; unset = 24, and 64 beyond 256 tokens",
    )
    fp8_dispatch: bool = Field(
        False, description="deepep: tokens travel to the experts as float8_e4m3, scaled by blocks of 128"
    )


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
        raise UserError(source, f"holds a {type(data).__name__}", "write a mapping of sections: model, router ...")
    try:
        return MeshConfig.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole)"
            if item["type"] == "extra_forbidden":
                problems.append(f"{key}: unknown key")
            else:
                problems.append(f"{key}: {item['msg']} (got {item['input']!r})" if item["loc"] else item["msg"])
        raise UserError(source, "; ".join(problems), "see docs/configuration.md for every key") from None


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
        raise UserError(str(path), f"cannot be read ({error})", "give the path of a mesh.yaml") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(str(path), f"is not valid YAML ({error})", "mend the file") from None
    return parse_config(data, str(path))
