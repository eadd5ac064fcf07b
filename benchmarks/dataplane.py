"""Time of one dispatch and combine over each transport of the collective data plane.

    python benchmarks/dataplane.py [--tokens 8] [--attention 2] [--experts 3] [--json FILE]

Every rank is a process with one torch thread. Expert compute is left out: what comes in goes back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from expertmesh.cli.certs import make_certificates
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.dataplane import Exchange
from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.collective import CollectivePlane
from expertmesh.mesh.dataplane.secure_sockets import SecureGroup
from expertmesh.mesh.dataplane.sockets import SocketGroup
from expertmesh.mesh.rank_security import RankSecurity

TIMEOUT_S = 30.0
WARM_UP, ROUNDS = 100, 500


def gloo(rank: int, size: int, store: TCPStore) -> Any:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return ProcessGroupGloo(PrefixStore("gloo/", store), rank, size, options)


def linked(name: str, rank: int, size: int, store: TCPStore) -> dict[int, socket.socket]:
    """A link to every other rank."""
    links = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        store.set(f"{name}/{rank}", str(server.getsockname()[1]))
        for peer in range(rank):
            link = socket.create_connection(("127.0.0.1", int(store.get(f"{name}/{peer}"))))
            link.sendall(bytes([rank]))
            links[peer] = link
        for _ in range(rank + 1, size):
            link, _ = server.accept()
            links[link.recv(1)[0]] = link
    return links


def tcp(rank: int, size: int, store: TCPStore) -> Any:
    return SocketGroup(linked("tcp", rank, size, store), timeout_s=TIMEOUT_S)


def tls(rank: int, size: int, store: TCPStore) -> Any:
    """One certificate for all ranks, which rank 0 makes and shows the others."""
    if rank == 0:
        folder = Path(tempfile.mkdtemp(prefix="expertmesh-dataplane-"))
        make_certificates(folder, ["both"])
        store.set("tls/folder", str(folder))
    folder = Path(store.get("tls/folder").decode())
    security = RankSecurity(
        TlsConfig(cert_file=folder / "both.pem", key_file=folder / "both.key", ca_file=folder / "ca.pem")
    )
    meet(store, "tls/read", size)
    if rank == 0:
        shutil.rmtree(folder)
    streams = {
        peer: security.stream(link, is_caller=peer < rank) for peer, link in linked("tls", rank, size, store).items()
    }
    for _, stream in sorted(streams.items()):
        while not stream.shake():
            stream.feed()
    return SecureGroup(streams, timeout_s=TIMEOUT_S)


TRANSPORTS = {"gloo": gloo, "tcp": tcp, "tcp with TLS": tls}


def run_rank(rank: int, arguments: argparse.Namespace, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    size = arguments.attention + arguments.experts
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    tokens = [arguments.tokens if peer < arguments.attention else 0 for peer in range(size)]
    shape = PlaneShape(
        rank=rank,
        size=size,
        expert_ranks=tuple(range(arguments.attention, size)),
        slots_per_rank=arguments.slots,
        hidden_size=arguments.hidden,
        top_k=arguments.top_k,
        dtype=torch.float32,
        max_num_tokens=max(tokens),
    )
    generator = torch.Generator().manual_seed(rank)
    count = tokens[rank]
    x = torch.randn(count, arguments.hidden, generator=generator)
    slots = torch.randint(0, arguments.slots * arguments.experts, (count, arguments.top_k), generator=generator)
    weights = torch.rand(count, arguments.top_k, generator=generator)
    exchange = Exchange(layer=0, version=1, tokens=tokens)
    with torch.inference_mode():
        for name, make in TRANSPORTS.items():
            plane = CollectivePlane(make(rank, size, store), shape, timeout_s=TIMEOUT_S)
            times = []
            for turn in range(WARM_UP + ROUNDS):
                if turn == WARM_UP:
                    cpu = time.process_time()
                started = time.perf_counter()
                dispatched = plane.dispatch(x, slots, weights, exchange).wait()
                plane.combine(dispatched.rows_NH, dispatched.handle).wait()
                times.append(time.perf_counter() - started)
            results.put((name, rank, statistics.median(times[WARM_UP:]), (time.process_time() - cpu) / ROUNDS))
            meet(store, f"done/{name}", size)  # nobody closes its group while another one still reads from it
            plane.close()


def meet(store: TCPStore, name: str, size: int) -> None:
    if store.add(name, 1) == size:
        store.set(f"{name}/all", "1")
    store.wait([f"{name}/all"], timedelta(seconds=TIMEOUT_S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 8, "attention": 2, "experts": 3, "hidden": 256, "top-k": 4, "slots": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    size = arguments.attention + arguments.experts
    ranks = [context.Process(target=run_rank, args=(rank, arguments, port, results)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    rows = [results.get(timeout=120) for _ in range(len(TRANSPORTS) * size)]
    for rank in ranks:
        rank.join(timeout=30)
    report = {
        name: {
            "round_trip_us": round(1e6 * max(median for n, _, median, _ in rows if n == name)),
            "cpu_us_all_ranks": round(1e6 * sum(cpu for n, _, _, cpu in rows if n == name)),
        }
        for name in TRANSPORTS
    }
    for name, figures in report.items():
        print(
            f"{name}: {figures['round_trip_us']} µs a round trip, {figures['cpu_us_all_ranks']} µs of CPU on all ranks"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "system": platform.system(), "torch": torch.__version__}
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"machine": machine, "settings": settings, "results": report}, indent=1))


if __name__ == "__main__":
    main()
