"""``attention``, ``expert`` and ``dataplane``: what ranks hold, and how they exchange tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expertmesh.mesh.config_section import Section, YamlSwitch


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
    prompt_graph_tokens: int = Field(
        1024,
        ge=0,
        le=2048,
        description="on GPUs, tokens of a step with prompts, those of decoding sequences included, up to which a CUDA "
        "graph computes it, so far as max_num_batched_tokens allows so many; 0 = none; the same on all ranks",
    )
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


class DataPlaneConfig(Section):
    backend: Literal["auto", "deepep", "nccl", "tcp", "gloo"] = Field(
        "auto", description="auto = tcp on CPUs; on GPUs deepep where every rank can use it, or else nccl"
    )
    interface_host: str = Field("127.0.0.1", description="address of the interface that the data plane binds to")
    port: int = Field(0, ge=0, le=65535, description="where the other ranks call a rank; 0 = any free port")
    tls: Annotated[Literal["auto", "on", "off"], YamlSwitch] = Field(
        "auto",
        description="between ranks: steps, activations (backend `tcp`), weights, KV blocks; auto = where `tls` has "
        "cert_file and ca_file; on = refuse to start without. The same on all ranks",
    )
    max_num_tokens: int = Field(512, ge=1, description="tokens of one rank in one exchange; longer batches are split")
    micro_batches: int = Field(
        1,
        ge=1,
        le=2,
        description="2 = a step of several sequences is computed as two that take turns: while the tokens of one are "
        "with the experts, attention servers compute the other one's attention; the same on all ranks",
    )
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
