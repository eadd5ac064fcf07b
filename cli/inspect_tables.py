"""What ``expertmesh inspect`` prints for people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from expertmesh.mesh.model.sizes import ModelSizes
from expertmesh.mesh.model.spec import DTYPE_BYTES

if TYPE_CHECKING:
    from expertmesh.cli.inspect_model import DryPlacement, GpuFit

NUM_NAMED = 5


def print_sizes(model: str, sizes: ModelSizes, dtype: str) -> None:
    arch, dtype_bytes = sizes.arch, DTYPE_BYTES[dtype]
    stored = _bytes(sizes.stored_expert_bytes) if sizes.stored_expert_bytes is not None else "unknown"
    total = _bytes(sizes.stored_bytes) if sizes.stored_bytes is not None else "of unknown size"
    weights = f"{total} in files" if sizes.has_weights else f"not here; {total} by config.json"
    _print_rows(
        [
            ("model", f"{model} ({sizes.family})"),
            ("weights", f"{weights}{f', quantised: {sizes.quantization}' if sizes.quantization else ''}"),
            ("layers", f"{arch.num_layers}, with experts: {ranges(arch.moe_layers)}"),
            ("experts", f"{arch.num_experts} a layer, {arch.top_k} a token"),
            ("parameters", f"{_count(sizes.total_parameters)}, {_count(sizes.active_parameters)} active"),
            ("dense", f"{_count(sizes.dense_parameters)}, {_bytes(sizes.dense_parameters * dtype_bytes)} in {dtype}"),
            ("one expert", f"{_bytes(sizes.expert_parameters * dtype_bytes)} in {dtype}, {stored} as stored"),
            ("KV cache", f"{sizes.kv_values_per_token * dtype_bytes:,} bytes a token in {dtype}"),
        ]
    )
    if sizes.not_served is not None:
        typer.echo(f"not served: {sizes.not_served}")
    if sizes.unused is not None:
        _print_unused(sizes.unused.unexpected, "no part of the model uses")
        for kind, count in sizes.unused.ignored.items():
            typer.echo(f"left out: {count} tensors, {kind}")


def print_fit(fit: GpuFit, sizes: ModelSizes) -> None:
    experts = sizes.arch.num_experts
    servers = f"; all {experts} experts take {fit.expert_servers} of them" if fit.expert_servers is not None else ""
    dense = f"{fit.kv_tokens:,} tokens of KV cache after the dense weights"
    if not fit.kv_tokens:
        dense = "the dense weights do not fit"
    typer.echo(f"\nof {fit.gpu_memory_gib:g} GiB a GPU, {_bytes(fit.usable_bytes)} for weights and KV cache:")
    _print_rows(
        [
            ("expert server", f"{fit.expert_slots} slots a layer{servers}"),
            ("attention server", dense),
            ("both", f"{fit.both_slots} slots a layer beside the dense weights and {_bytes(fit.kv_cache_bytes)} of KV"),
        ]
    )


def print_placement(placement: DryPlacement, sizes: ModelSizes) -> None:
    most = f"{placement.experts_with_most} experts have {placement.replicas_max}"
    replicas = f"{placement.replicas_min}" if placement.replicas_min == placement.replicas_max else most
    others = "" if placement.replicas_min == placement.replicas_max else f", the others {placement.replicas_min}"
    typer.echo(f"\n{placement.servers} expert servers of {placement.slots_per_server} slots a layer:")
    _print_rows(
        [
            ("slots", f"{placement.slots} a layer for {sizes.arch.num_experts} experts"),
            ("replicas", f"{replicas}{others}"),
            ("one server lost", f"at most {placement.experts_lost_with_a_server} experts a layer without a replica"),
            ("balancedness", f"{placement.balancedness:.4f} for equal loads"),
            ("a server", f"{_bytes(placement.bytes_per_server)} of slots"),
        ]
    )


def ranges(numbers: Sequence[int]) -> str:
    """3, 4, 5, 7 as ``3-5, 7``; every second number of a long row as ``1, 3 ... 47``."""
    steps = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} ... {numbers[-1]} ({len(numbers)})"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{text} ({len(numbers)})"


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name.ljust(width)}  {value}")


def _print_unused(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - NUM_NAMED} others" if len(names) > NUM_NAMED else ""
        typer.echo(f"warning: {what} {', '.join(names[:NUM_NAMED])}{more}")


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:g} bytes"
