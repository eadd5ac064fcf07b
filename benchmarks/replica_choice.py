"""The choice of replicas: quotas by source against equal shares, and the rule of a device against that of the CPU.

    python benchmarks/replica_choice.py --data DIR

DIR (or EXPERTMESH_ROUTING_DATA) holds the published routing data; see ``routing_data.py``. gpt-oss-20b's tokens, top 4
of 32 experts, on 8 expert ranks of 2 nodes: placed, and quotas found, on half of the sequences; scored on the others.
Nothing here depends on the machine's speed. Writes ``benchmarks/results/replica_choice.json``.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1")  # before NumPy is loaded

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import routing_data
import torch
from balancer import THOROUGH, split_by_sequence
from numpy.typing import NDArray

from expertmesh.balancer.policy import LayerStatistics, Layout, Prediction, Proposal, Quotas
from expertmesh.balancer.simulator.sources import (
    Source,
    SourcesScore,
    quotas_for,
    route_sources,
    score_sources,
)
from expertmesh.balancer.solver import Topology, count_routing, solve_layer
from expertmesh.balancer.source_quotas import with_quotas
from expertmesh.kernels.gate import ReplicaPrices, SlotTables
from expertmesh.kernels.gate_reference import choose_replicas, settled_prices
from expertmesh.mesh import placement

Ids = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]
NUM_EXPERTS, NUM_RANKS, NUM_NODES = 32, 8, 2
STEP_TOKENS = 16
"""Of each source."""
WINDOWS = (256, 512, 2048)
DEVICE_STEPS = (8, 64, 512)
ON_NODES = (Source(node=0), Source(node=1))
APART = (Source(), Source())
COLOCATED = tuple(Source(node=rank * NUM_NODES // NUM_RANKS, rank=rank) for rank in range(NUM_RANKS))
CASES = (
    ("alike, one source a node", ON_NODES, "alike", None),
    ("MMLU on one node, GPQA on the other", ON_NODES, "differ", None),
    ("alike, 8 sources, each an expert rank too", COLOCATED, "alike", None),
    ("MMLU and GPQA, sources on nodes of their own", APART, "differ", None),
    ("alike, quotas made when the first source had 65 % of the tokens", ON_NODES, "alike", (0.65, 0.35)),
)


def topology_of(slots: int) -> Topology:
    return Topology.even(num_slots=slots, num_ranks=NUM_RANKS, num_nodes=NUM_NODES)


class Traffic:
    """Tokens of each source to plan with and to score: indices, the same for all layers."""

    def __init__(self, tokens: routing_data.Tokens, kind: str, num_sources: int, seed: int) -> None:
        if kind == "alike":
            halves = split_by_sequence(tokens, np.ones(len(tokens.sequence_T), np.bool_), seed)
            self.train_S, self.rest_S = (np.array_split(half, num_sources) for half in halves)
            return
        names = tokens.dataset_T
        mmlu_T = np.char.startswith(names, "mmlu_") & ~np.char.startswith(names, "mmlu_pro")
        both = [split_by_sequence(tokens, mask_T, seed) for mask_T in (mmlu_T, np.char.startswith(names, "gpqa"))]
        count_2 = [min(len(part) for part in parts) for parts in zip(*both, strict=True)]
        self.train_S, self.rest_S = (
            [part[:count] for part in parts] for parts, count in zip(zip(*both, strict=True), count_2, strict=True)
        )


def quota_rows(tokens: routing_data.Tokens, splits: int) -> list[dict[str, Any]]:
    rows = []
    for slots in (40, 64):
        for what, sources, kind, volumes in CASES:
            found: dict[str, list[SourcesScore]] = {"equal shares": [], "quotas": []}
            for seed in range(splits):
                traffic = Traffic(tokens, kind, len(sources), seed)
                for topk_TK in tokens.topk_LTK:
                    for name, score in scores_of(topk_TK, traffic, sources, volumes, slots).items():
                        found[name].append(score)
            for name, scores in found.items():
                rows.append({"slots": slots, "traffic": what, "shares": name, **mean_of(scores)})
                print(as_text(rows[-1]), flush=True)
    return rows


def scores_of(
    topk_TK: Ids, traffic: Traffic, sources: Sequence[Source], volumes: tuple[float, ...] | None, slots: int
) -> dict[str, SourcesScore]:
    topology = topology_of(slots)
    train_S = [topk_TK[part] for part in traffic.train_S]
    load_SE = np.stack([np.bincount(part.ravel(), minlength=NUM_EXPERTS).astype(np.float64) for part in train_S])
    if volumes is not None:
        load_SE *= np.array(volumes)[:, None] * len(volumes)
    placed = solve_layer(*count_routing(np.concatenate(train_S), NUM_EXPERTS), topology, THOROUGH).slots
    rest_S = [topk_TK[part] for part in traffic.rest_S]
    found = {}
    for name, share_SR in (("equal shares", None), ("quotas", quotas_for(placed, load_SE, sources, topology))):
        rank_S = route_sources(placed, rest_S, sources, topology, NUM_EXPERTS, share_SR, step_tokens=STEP_TOKENS)
        found[name] = score_sources(rank_S, sources, topology, step_tokens=STEP_TOKENS, windows=WINDOWS)
    return found


def mean_of(scores: Sequence[SourcesScore]) -> dict[str, float]:
    names = ("rows_away", "ranks_away", "ranks", "nodes", "balancedness")
    found = {name: float(np.mean([getattr(score, name) for score in scores])) for name in names}
    windows = np.mean([score.windows for score in scores], axis=0)
    return found | {f"balancedness_{window}": float(b) for window, b in zip(WINDOWS, windows, strict=True)}


def as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['slots']} slots, {row['traffic']}, {row['shares']}: {row['rows_away']:.2f} rows and "
        f"{row['ranks_away']:.2f} rank visits a token leave the node; {visits_as_text(row)}"
    )


def visits_as_text(row: dict[str, Any]) -> str:
    windows = ", ".join(f"{window} tokens {row[f'balancedness_{window}']:.3f}" for window in WINDOWS)
    return (
        f"{row['ranks']:.2f} ranks, {row['nodes']:.2f} nodes; balancedness {row['balancedness']:.3f}, "
        f"in windows of {windows}"
    )


def steady_row(tokens: routing_data.Tokens, windows: int = 10) -> dict[str, Any]:
    """The same traffic ten times over, half of it at each of two sources: how often a layer gets other quotas."""
    topology = topology_of(40)
    layout = Layout(
        width=topology.width,
        room_R=topology.slots_of_rank,
        node_R=tuple(f"n{node}" for node in topology.node_R),
        server_R=tuple(f"e{rank}" for rank in range(NUM_RANKS)),
        sources={"a0": "n0", "a1": "n1"},
    )
    order = np.random.default_rng(0).permutation(len(tokens.sequence_T))
    versions = 0
    for topk_TK in tokens.topk_LTK:
        slots = solve_layer(*count_routing(topk_TK[order], NUM_EXPERTS), topology, THOROUGH).slots.tolist()
        quotas: Quotas = {}
        for window in np.array_split(order, windows):
            halves = np.array_split(window, 2)
            loads = [np.bincount(topk_TK[half].ravel(), minlength=NUM_EXPERTS).astype(np.float64) for half in halves]
            counts = LayerStatistics(
                tokens=len(window),
                load_E=loads[0] + loads[1],
                coactivation_EE=None,
                sources={"a0": loads[0], "a1": loads[1]},
            )
            found = with_quotas(unchanged(slots), counts, layout, slots, quotas)
            if found.worthwhile:
                quotas, versions = found.quotas, versions + 1
    row = {"windows": windows, "versions_per_layer": versions / len(tokens.topk_LTK)}
    print(f"steady traffic, {windows} windows: {row['versions_per_layer']:.2f} versions of quotas a layer")
    return row


def unchanged(slots: Sequence[int]) -> Proposal:
    """No better placement."""
    here = Prediction(balancedness=1.0, fanout_ranks=None, fanout_nodes=None)
    return Proposal(slots=tuple(slots), before=here, after=here, gain=0.0, noise=0.0, worthwhile=False, num_loads=0)


def device_rows(tokens: routing_data.Tokens, num_layers: int, num_tokens: int) -> list[dict[str, Any]]:
    """One source, 40 slots: what the rule of the gate kernel (its reference) makes of steps of several sizes."""
    topology = topology_of(40)
    train, rest = split_by_sequence(tokens, np.ones(len(tokens.sequence_T), np.bool_), 0)
    found: dict[tuple[str, int], list[SourcesScore]] = {}
    for layer in np.linspace(0, len(tokens.topk_LTK) - 1, num_layers).astype(int):
        topk_TK = tokens.topk_LTK[layer]
        slots = solve_layer(*count_routing(topk_TK[train], NUM_EXPERTS), topology, THOROUGH).slots
        expert_TK = torch.from_numpy(topk_TK[rest[:num_tokens]].astype(np.int64))
        for step in DEVICE_STEPS:
            host = route_sources(slots, [expert_TK.numpy()], [Source()], topology, NUM_EXPERTS, None, step_tokens=step)
            for rule, rank_TK in (("CPU", host[0]), ("device", device_ranks(slots, expert_TK, topology, step))):
                score = score_sources([rank_TK], [Source()], topology, step_tokens=step, windows=WINDOWS)
                found.setdefault((rule, step), []).append(score)
    rows = []
    for (rule, step), scores in found.items():
        rows.append({"rule": rule, "step_tokens": step, **mean_of(scores)})
        print(f"{rule} rule, steps of {step} tokens: {visits_as_text(rows[-1])}", flush=True)
    return rows


def device_ranks(slots: NDArray[np.int32], expert_TK: torch.Tensor, topology: Topology, step: int) -> Ids:
    """Rank of each choice, step by step, each one committed."""
    where = placement.Topology(slots_per_rank=topology.width, node_R=tuple(topology.node_R.tolist()))
    routing = placement.LayerRouting(slots.tolist(), NUM_EXPERTS, where)
    tables = SlotTables(
        replica_EW=torch.from_numpy(routing.slot_EW).int(),
        rank_EW=torch.from_numpy(routing.rank_EW).int(),
        node_R=torch.from_numpy(topology.node_R),
    )
    prices, found = ReplicaPrices.equal(topology.num_ranks, "cpu"), []
    for expert_SK in torch.split(expert_TK, step):
        rank_SK = tables.rank_EW[expert_SK, choose_replicas(expert_SK, tables, prices.price_R)].long()
        prices.after_R.copy_(settled_prices(prices, rank_SK))
        prices.commit()
        found.append(rank_SK.numpy())
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EXPERTMESH_ROUTING_DATA"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replica_choice.json")
    parser.add_argument("--splits", type=int, default=2, help="splits of the gpt-oss sequences")
    parser.add_argument("--device-layers", type=int, default=6, help="layers that the device's rule is scored on")
    parser.add_argument("--device-tokens", type=int, default=24_576, help="tokens of each of them")
    arguments = parser.parse_args()
    if arguments.data is None or not arguments.data.is_dir():
        parser.error("--data (or EXPERTMESH_ROUTING_DATA) must name the folder with the routing data")
    torch.set_num_threads(1)
    tokens = routing_data.gptoss_tokens(arguments.data)
    report = {
        "command": "python benchmarks/replica_choice.py --data DIR",
        "step_tokens": STEP_TOKENS,
        "quotas": quota_rows(tokens, arguments.splits),
        "steady": steady_row(tokens),
        "device": device_rows(tokens, arguments.device_layers, arguments.device_tokens),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
