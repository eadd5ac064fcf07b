"""``expertmesh inspect``: how large a model is, what of it fits a GPU, and how its experts would be placed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from expertmesh.balancer.placement_static import CapacityError, place_layer
from expertmesh.cli import inspect_tables
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.hub import is_repo
from expertmesh.mesh.model.sizes import ModelSizes, read_sizes
from expertmesh.mesh.model.spec import DTYPE_BYTES, checkpoint_folder

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFit:
    """What fits the memory of one GPU. Slots are a layer's; every slot is in all MoE layers.

    Args:
        usable_bytes: of the memory; the rest is for activations, exchange buffers and the allocator.
        kv_cache_bytes: reserved on a rank with both halves.
        expert_slots: on an expert server.
        expert_servers: needed for all experts once.
        kv_tokens: in the KV cache of an attention server, after the dense weights; 0 = these do not fit.
        both_slots: on a rank with both halves, after the dense weights and ``kv_cache_bytes``.
    """

    gpu_memory_gib: float
    usable_bytes: int
    kv_cache_bytes: int
    expert_slots: int
    expert_servers: int | None
    kv_tokens: int
    both_slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DryPlacement:
    """The static placement of one layer.

    Args:
        experts_lost_with_a_server: most experts whose every replica is on one server.
        balancedness: mean / max load of a server if all experts have equal load, replicas sharing it evenly.
        bytes_per_server: of the slots, all MoE layers, in the compute dtype.
    """

    servers: int
    slots_per_server: int
    slots: int
    replicas_min: int
    replicas_max: int
    experts_with_most: int
    experts_lost_with_a_server: int
    balancedness: float
    bytes_per_server: int


def inspect_model(
    model: Annotated[str, typer.Argument(help="Checkpoint folder (config.json is enough) or ORGANISATION/NAME.")],
    dtype: Annotated[str, typer.Option(help="That a mesh would compute in: float32 or bfloat16.")] = "bfloat16",
    revision: Annotated[str | None, typer.Option(help="Of ORGANISATION/NAME: a commit, tag or branch.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of one GPU: show what fits.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Part of it for weights and KV cache.")] = 0.9,
    kv_cache: Annotated[float, typer.Option(help="GiB of KV cache on a GPU with both halves.")] = 4.0,
    servers: Annotated[int | None, typer.Option(help="Expert servers: show a dry placement.")] = None,
    slots_per_server: Annotated[int | None, typer.Option(help="Slots a layer on each; all are filled.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's family, sizes, bytes per expert and KV bytes per token; no weight is read.

    Of ORGANISATION/NAME on the Hugging Face hub only config.json is fetched.
    """
    if dtype not in DTYPE_BYTES:
        raise UserError("--dtype", f"is {dtype!r}", f"choose one of {', '.join(DTYPE_BYTES)}")
    is_hub = is_repo(model)
    if revision is not None and not is_hub:
        raise UserError("--revision", f"is set and {model} is a folder", "leave it out")
    config = ModelConfig(repo=model, revision=revision) if is_hub else ModelConfig(path=Path(model))
    sizes = read_sizes(checkpoint_folder(config, weights=False))
    fit = _fit(sizes, DTYPE_BYTES[dtype], gpu_memory, gpu_memory_utilization, kv_cache)
    placement = _place(sizes, DTYPE_BYTES[dtype], servers, slots_per_server)
    if as_json:
        typer.echo(json.dumps(_as_json(model, sizes, dtype, fit, placement)))
    else:
        inspect_tables.print_sizes(model, sizes, dtype)
        if fit is not None:
            inspect_tables.print_fit(fit, sizes)
        if placement is not None:
            inspect_tables.print_placement(placement, sizes)


def _fit(
    sizes: ModelSizes, dtype_bytes: int, memory_gib: float | None, utilization: float, kv_gib: float
) -> GpuFit | None:
    if memory_gib is None:
        return None
    for option, value in (("--gpu-memory", memory_gib), ("--gpu-memory-utilization", utilization)):
        if not 0 < value <= (1 if option.endswith("utilization") else 10**6):
            raise UserError(option, f"is {value:g}", "give a positive number (a part of 1 for the utilization)")
    if not 0 <= kv_gib <= memory_gib:
        raise UserError("--kv-cache", f"is {kv_gib:g}", f"give GiB up to --gpu-memory = {memory_gib:g}")
    usable, kv_bytes = int(memory_gib * GIB * utilization), int(kv_gib * GIB)
    slot_bytes = _slot_bytes(sizes, dtype_bytes)
    left = max(0, usable - sizes.dense_parameters * dtype_bytes)
    experts = sizes.arch.num_experts
    expert_slots = min(experts, usable // slot_bytes)
    return GpuFit(
        gpu_memory_gib=memory_gib,
        usable_bytes=usable,
        kv_cache_bytes=kv_bytes,
        expert_slots=expert_slots,
        expert_servers=-(-experts // expert_slots) if expert_slots else None,
        kv_tokens=left // (sizes.kv_values_per_token * dtype_bytes),
        both_slots=min(experts, max(0, left - kv_bytes) // slot_bytes),
    )


def _place(
    sizes: ModelSizes, dtype_bytes: int, servers: int | None, slots_per_server: int | None
) -> DryPlacement | None:
    if servers is None and slots_per_server is None:
        return None
    if servers is None or slots_per_server is None or servers < 1 or slots_per_server < 1:
        raise UserError(
            "--servers and --slots-per-server", f"are {servers} and {slots_per_server}", "give both, 1 or more"
        )
    experts = sizes.arch.num_experts
    slots = min(slots_per_server, experts) * servers
    try:
        table_RS = place_layer(experts, max(slots, experts), [slots_per_server] * servers)
    except CapacityError as error:
        raise UserError(
            "--slots-per-server",
            f"is {slots_per_server}: {error}",
            f"give {-(-experts // servers)} or more, or more servers",
        ) from None
    held_RE = np.array([[expert in row for expert in range(experts)] for row in table_RS.tolist()])
    replicas_E = held_RE.sum(axis=0)
    load_R = (held_RE / replicas_E).sum(axis=1)
    return DryPlacement(
        servers=servers,
        slots_per_server=slots_per_server,
        slots=int(held_RE.sum()),
        replicas_min=int(replicas_E.min()),
        replicas_max=int(replicas_E.max()),
        experts_with_most=int((replicas_E == replicas_E.max()).sum()),
        experts_lost_with_a_server=int(held_RE[:, replicas_E == 1].sum(axis=1).max()),
        balancedness=float(load_R.mean() / load_R.max()),
        bytes_per_server=slots_per_server * _slot_bytes(sizes, dtype_bytes),
    )


def _slot_bytes(sizes: ModelSizes, dtype_bytes: int) -> int:
    """Of one slot in each MoE layer."""
    return len(sizes.arch.moe_layers) * sizes.expert_parameters * dtype_bytes


def _as_json(
    model: str, sizes: ModelSizes, dtype: str, fit: GpuFit | None, placement: DryPlacement | None
) -> dict[str, Any]:
    arch, dtype_bytes = sizes.arch, DTYPE_BYTES[dtype]
    return {
        "model": model,
        "family": sizes.family,
        "layers": arch.num_layers,
        "moe_layers": list(arch.moe_layers),
        "num_experts": arch.num_experts,
        "top_k": arch.top_k,
        "hidden_size": arch.hidden_size,
        "moe_intermediate_size": arch.moe_intermediate_size,
        "max_model_len": arch.max_model_len,
        "parameters": {
            "total": sizes.total_parameters,
            "active": sizes.active_parameters,
            "dense": sizes.dense_parameters,
            "embedding": sizes.embedding_parameters,
            "expert": sizes.expert_parameters,
        },
        "has_weights": sizes.has_weights,
        "quantization": sizes.quantization,
        "not_served": sizes.not_served,
        "stored_bytes": sizes.stored_bytes,
        "stored_bytes_per_expert": sizes.stored_expert_bytes,
        "dtype": dtype,
        "bytes_per_expert": sizes.expert_parameters * dtype_bytes,
        "dense_bytes": sizes.dense_parameters * dtype_bytes,
        "total_bytes": sizes.total_parameters * dtype_bytes,
        "kv_bytes_per_token": sizes.kv_values_per_token * dtype_bytes,
        "unexpected_tensors": None if sizes.unused is None else list(sizes.unused.unexpected),
        "ignored_tensors": None if sizes.unused is None else dict(sizes.unused.ignored),
        "gpu": None if fit is None else asdict(fit),
        "placement": None if placement is None else asdict(placement),
    }
