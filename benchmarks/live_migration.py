"""What serving pays for continuous migration: the demo mesh under traffic that shifts its domain again and again.

    python benchmarks/live_migration.py [--commits 200] [--json FILE]

Two attention and four expert servers with 48 slots serve 16 greedy streams without a pause. First the mesh fits its
placement to German and French; then the traffic shifts to code and arithmetic, is measured under the placement that has
become stale, and again after the balancer has followed. Then rounds of equal length alternate between mode online,
where each shift of the domain moves experts, and mode static with the same shifts, so that a machine that changes its
speed is the same for both. Weights go from rank to rank at a rate at which a migration is under way nearly all of an
online round; ``share_of_time_migrating`` says how much of it. Every token of every request is compared with
transformers'.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from tokenizers import Tokenizer

from expertmesh.cli.bench_load import Timed
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, generate_pb2, generate_pb2_grpc

PROMPTS_FILE = Path(__file__).parents[1] / "demo/prompts.jsonl"
DOMAINS = (("german", "french"), ("code", "math"))
NUM_STREAMS = 16
NUM_TOKENS = 48
SETTINGS = {
    "attention.servers": 2,
    "expert.servers": 4,
    "expert.num_slots": 48,
    "balancer.stats_half_life_tokens": 8000,
    "balancer.stats_interval_s": 1.0,
    "balancer.layer_updates_per_iter": 1,
    "balancer.migration_bytes_per_s": 400_000,
    "telemetry.metrics_port": 0,
}
SHIFTS_PER_ROUND = 2
FIT_S = 15.0
"""How long a domain runs before its placement is looked at: some half-lives of the statistics."""
MOST_PAIRS = 12
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """With what transformers continues it."""

    text: str
    expected: tuple[int, ...]


def load_prompts() -> list[list[Prompt]]:
    """The demo's prompts of each group of ``DOMAINS``."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(1)
    path = demo_model_path()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = GenerationConfig(max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)

    def reference(text: str) -> Prompt:
        ids_BT = torch.tensor([tokenizer.encode(text).ids])
        with torch.inference_mode():
            out_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config)
        return Prompt(text=text, expected=tuple(out_BT[0, ids_BT.shape[1] :].tolist()))

    lines = [json.loads(line) for line in PROMPTS_FILE.read_text(encoding="utf-8").splitlines()]
    return [[reference(line["prompt"]) for line in lines if line["domain"] in group] for group in DOMAINS]


class Traffic:
    """``NUM_STREAMS`` requests at any time, one following the other, of the group of prompts that ``group`` says."""

    def __init__(self, router: str, prompts: Sequence[Sequence[Prompt]]) -> None:
        self._router = router
        self._turns = [itertools.cycle(group) for group in prompts]
        self.group = 0
        self.finished: list[Timed] = []
        self.num_wrong = 0

    def shift(self) -> None:
        self.group = (self.group + 1) % len(self._turns)

    async def run(self) -> None:
        """Until it is cancelled."""
        async with rpc.open_channel(self._router, TlsConfig()) as channel, asyncio.TaskGroup() as group:
            stub = generate_pb2_grpc.GenerationServiceStub(channel)
            for _ in range(NUM_STREAMS):
                group.create_task(self._stream(stub))

    async def _stream(self, stub: generate_pb2_grpc.GenerationServiceStub) -> None:
        sampling = generate_pb2.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        while True:
            prompt = next(self._turns[self.group])
            request = generate_pb2.GenerateRequest(text=prompt.text, sampling_params=sampling)
            sent_s, times_s, ids = time.perf_counter(), list[float](), list[int]()
            async for message in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                times_s += [time.perf_counter()] * len(message.token_ids)
                ids += message.token_ids
            self.num_wrong += tuple(ids) != prompt.expected
            self.finished.append(Timed(sent_s=sent_s, token_times_s=times_s))

    def between(self, start_s: float, end_s: float) -> list[Timed]:
        """The requests that ran as a whole in this time."""
        return [request for request in self.finished if start_s <= request.sent_s and request.token_times_s[-1] < end_s]


class Mesh:
    """A local mesh with what the balancer and the services say about themselves."""

    def __init__(self, local: LocalMesh, admin: admin_pb2_grpc.AdminServiceStub) -> None:
        self._local = local
        self._admin = admin

    async def switch(self, mode: str) -> None:
        """Returns when nothing migrates any more that the mode before began."""
        await self._admin.SetMode(admin_pb2.SetModeRequest(mode=mode))
        while mode == "static" and (await self.status()).migrations:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(POLL_S)

    async def status(self) -> admin_pb2.GetStatusResponse:
        return await self._admin.GetStatus(admin_pb2.GetStatusRequest())

    async def quality(self) -> dict[str, float]:
        """Of the placement in force, means over layers, and the worst layer's balancedness."""
        layers = (await self._admin.GetLoads(admin_pb2.GetLoadsRequest())).layers
        fanouts = [layer.fanout_ranks for layer in layers if layer.fanout_ranks]  # 0: nothing counted yet
        return {
            "balancedness_mean": round(statistics.mean(layer.balancedness for layer in layers), 3),
            "balancedness_min": round(min(layer.balancedness for layer in layers), 3),
            "fanout_ranks": round(statistics.mean(fanouts), 3),
        }

    def counts(self) -> dict[str, float]:
        """Slots that were switched, by where their weights came from."""
        found: dict[str, float] = {"peer": 0, "local": 0, "checkpoint": 0}
        for server in self._local.servers.values():
            if server.role == "expert":
                for sample in self._metrics(server.id, "expertmesh_migrated_slots_total"):
                    found[sample.labels["source"]] += sample.value
        return found

    def migrating_s(self) -> float:
        """How long migrations were under way so far, from the plan to the last rank's switch; one at a time."""
        name = "expertmesh_balancer_migration_stage_seconds_sum"
        return sum(sample.value for sample in self._metrics("balancer", name))

    def _metrics(self, server_id: str, name: str) -> list[Sample]:
        log = (self._local.state_dir / f"{server_id}.log").read_text(encoding="utf-8", errors="replace")
        with urllib.request.urlopen(re.findall(r"metrics on (http://\S+)", log)[-1], timeout=10) as response:
            text = response.read().decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return [sample for sample in samples if sample.name == name]

    def cpu_s(self) -> dict[str, float]:
        """CPU time so far of all services of a role."""
        used: dict[str, float] = {}
        for server in self._local.servers.values():
            times = psutil.Process(server.pid).cpu_times()
            used[server.role] = used.get(server.role, 0.0) + times.user + times.system
        return used


@asynccontextmanager
async def running(folder: Path, prompts: Sequence[Sequence[Prompt]]) -> AsyncIterator[tuple[Mesh, Traffic]]:
    """The mesh, with traffic. A request that fails ends it."""
    local = LocalMesh(with_overrides(MeshConfig(), SETTINGS), StateDir.claim(folder), restart=False)
    try:
        await asyncio.to_thread(local.start)
        await asyncio.to_thread(local.wait_ready, START_TIMEOUT_S)
        traffic = Traffic(local.router, prompts)
        async with rpc.open_channel(local.balancer, TlsConfig()) as channel, asyncio.TaskGroup() as group:
            task = group.create_task(traffic.run(), name="traffic")
            yield Mesh(local, admin_pb2_grpc.AdminServiceStub(channel)), traffic
            task.cancel()
    finally:
        await asyncio.to_thread(local.stop)


@dataclass(kw_only=True)
class Round:
    """What one round of one mode gave."""

    mode: str
    requests: list[Timed]
    seconds: float
    cpu_s: Mapping[str, float]
    committed: int
    migrating_s: float
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def gaps_ms(self) -> list[float]:
        """Between one token and the next of a request."""
        return [
            1e3 * (after - before)
            for request in self.requests
            for before, after in itertools.pairwise(request.token_times_s)
        ]

    def figures(self) -> dict[str, float]:
        tpot_ms = [request.tpot_ms for request in self.requests]
        tokens = sum(len(request.token_times_s) for request in self.requests)
        return {
            "tpot_ms_p50": float(np.percentile(tpot_ms, 50)),
            "tpot_ms_p99": float(np.percentile(tpot_ms, 99)),
            "token_gap_ms_p50": float(np.percentile(self.gaps_ms, 50)),
            "token_gap_ms_p99": float(np.percentile(self.gaps_ms, 99)),
            "output_tokens_per_s": tokens / self.seconds,
            **{f"cpu_ms_per_output_token_{role}": 1e3 * used_s / tokens for role, used_s in self.cpu_s.items()},
            "cpu_ms_per_output_token": 1e3 * sum(self.cpu_s.values()) / tokens,
        }


async def play(mesh: Mesh, traffic: Traffic, mode: str, seconds: float) -> Round:
    """One round: the domain shifts ``SHIFTS_PER_ROUND`` times, so it ends with the domain that it began with."""
    await mesh.switch(mode)
    before = (await mesh.status()).migrations_committed
    migrating_s = await asyncio.to_thread(mesh.migrating_s)
    start_s, start_cpu_s = time.perf_counter(), mesh.cpu_s()
    for _ in range(SHIFTS_PER_ROUND):
        traffic.shift()
        await asyncio.sleep(seconds / SHIFTS_PER_ROUND)
    end_s, end_cpu_s = time.perf_counter(), mesh.cpu_s()
    return Round(
        mode=mode,
        requests=traffic.between(start_s, end_s),
        seconds=end_s - start_s,
        cpu_s={role: used_s - start_cpu_s[role] for role, used_s in end_cpu_s.items()},
        committed=(await mesh.status()).migrations_committed - before,
        migrating_s=await asyncio.to_thread(mesh.migrating_s) - migrating_s,
    )


async def follow_a_shift(mesh: Mesh, traffic: Traffic) -> dict[str, Any]:
    """Fit one domain, shift to the other, measure the stale placement, let the balancer follow, measure again."""
    await mesh.switch("online")
    await asyncio.sleep(FIT_S)
    fitted = await mesh.quality()
    await mesh.switch("static")
    traffic.shift()
    await asyncio.sleep(FIT_S)
    stale, before = await mesh.quality(), await mesh.status()
    slots_before = await asyncio.to_thread(mesh.counts)
    await mesh.switch("online")
    await asyncio.sleep(FIT_S)
    await mesh.switch("static")
    await asyncio.sleep(FIT_S)  # under the placement as it is now, counted afresh
    slots = await asyncio.to_thread(mesh.counts)
    return {
        "before_the_shift": fitted,
        "after_the_shift_stale": stale,
        "after_the_shift_followed": await mesh.quality(),
        "migrations_committed": (await mesh.status()).migrations_committed - before.migrations_committed,
        "slots_moved": int(sum(slots.values()) - sum(slots_before.values())),
    }


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    say(f"transformers generates the reference; load average {os.getloadavg()}")
    load_before = os.getloadavg()
    prompts = load_prompts()
    async with running(folder, prompts) as (mesh, traffic):
        say("following one shift of the domain")
        shift = await follow_a_shift(mesh, traffic)
        say(json.dumps(shift))
        rounds = await alternate(mesh, traffic, arguments)
        status, slots = await mesh.status(), await asyncio.to_thread(mesh.counts)
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
        "load_average_before": [round(value, 2) for value in load_before],
        "settings": {**SETTINGS, "streams": NUM_STREAMS, "output_tokens": NUM_TOKENS, "round_s": arguments.seconds},
        "domain_shift": shift,
        **summary(rounds),
        "migrations_committed": status.migrations_committed,
        "migrations_aborted": status.migrations_aborted,
        "slots_moved": {name: int(count) for name, count in slots.items()},
        "requests": len(traffic.finished),
        "outputs_changed": traffic.num_wrong,
    }


async def alternate(mesh: Mesh, traffic: Traffic, arguments: argparse.Namespace) -> list[Round]:
    """Pairs of rounds, each mode first in turn, until enough pairs were played and enough layers migrated."""
    rounds: list[Round] = []
    for pair in range(MOST_PAIRS):
        if pair >= arguments.pairs and (await mesh.status()).migrations_committed >= arguments.commits:
            break
        for mode in ("static", "online") if pair % 2 == 0 else ("online", "static"):
            played = await play(mesh, traffic, mode, arguments.seconds)
            rounds.append(played)
            rounded = {name: round(value, 2) for name, value in played.figures().items()}
            what = f"{len(played.requests)} requests, {played.committed} migrations"
            say(f"round {len(rounds)}, {mode}: {what}, load average {played.load_average:.1f}, {rounded}")
    return rounds


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds of each mode, and of the ratios of the two rounds of a pair."""
    by_mode = {mode: [each for each in rounds if each.mode == mode] for mode in ("static", "online")}
    medians = {mode: _medians([each.figures() for each in played]) for mode, played in by_mode.items()}
    pairs = list(zip(by_mode["online"], by_mode["static"], strict=True))
    ratios = [{k: on / off for (k, on), off in zip(a.figures().items(), b.figures().values())} for a, b in pairs]  # noqa: B905
    migrated = sum(each.committed for each in by_mode["online"])
    online_s = sum(each.seconds for each in by_mode["online"])
    return {
        "pairs_of_rounds": len(pairs),
        "migrations_per_s": round(migrated / online_s, 2),
        "share_of_time_migrating": round(sum(each.migrating_s for each in by_mode["online"]) / online_s, 3),
        "median_of_rounds": medians,
        "online_over_static": {
            "of_medians": _rounded({k: medians["online"][k] / medians["static"][k] for k in medians["online"]}),
            "median_of_pairs": _rounded(_medians(ratios)),
        },
        "rounds": [
            {"mode": each.mode, "requests": len(each.requests), "migrations": each.committed}
            | {"share_of_time_migrating": round(each.migrating_s / each.seconds, 3)}
            | {"load_average": round(each.load_average, 2)}
            | _rounded(each.figures())
            for each in rounds
        ],
    }


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in row.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commits", type=int, default=200, help="layer migrations at least")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of rounds at least")
    parser.add_argument("--seconds", type=float, default=24.0, help="of a round")
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expertmesh-live-migration-") as folder:
        result = asyncio.run(measure(arguments, Path(folder)))
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
