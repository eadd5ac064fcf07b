"""What a router costs per streamed token: CPU time, with streams that get a token each in steps of one rate.

    PYTHONPATH=src:tests python benchmarks/router_streams.py [--streams 64 256 512] [--step-ms 18] [--http] \\
        [--routers N] [--out FILE]

A real router process between synthetic ends. This process is its attention server: the service that links speak to is
the real one, its engine a thread that gives every sequence a prepared token in each step, at ``--step-ms``; and it is
its balancer. Client processes read the streams, over gRPC or as server-sent events. CPU time is user and system, from
after the first steps to before the last ones; lateness is from the end of a step in the engine to the reading of its
token in the client. Where the machine is too slow for the rate, tokens of a stream share messages
(``tokens_per_message`` above 1) and cost less than at a rate that it keeps up with: then give a longer step.

Several routers (``--routers``) share an address, as behind `expertmesh up`; CPU time is that of all of them. A client
process has one connection for gRPC, so give as many (``--clients``) as spread evenly enough.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import google.protobuf
import grpc
import numpy as np
import psutil
import uvloop
import yaml
from tokenizers import Tokenizer

from expertmesh.attention_server.engine import Engine
from expertmesh.attention_server.events import Event
from expertmesh.attention_server.outputs import Load, Output
from expertmesh.attention_server.request import Sequence as Running
from expertmesh.attention_server.service import AttentionService
from expertmesh.cli.shared_door import SharedDoor
from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_host_port
from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.config import MeshConfig, TlsConfig, parse_config
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.v1 import attention_pb2_grpc, generate_pb2
from support.fake_attention import FakeBalancer

PROMPT_TOKENS = 16
CHARACTERS = 3
"""Of every token, so that the length of a text says how many tokens it is."""
WARM_STEPS, LAST_STEPS = 20, 5
TIMEOUT_S = 300.0
LENGTH = generate_pb2.FINISH_REASON_LENGTH
UNFINISHED = generate_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(frozen=True, kw_only=True)
class Usage:
    """CPU seconds since some moment: of each router, of this process, and of the thread in it that is the engine."""

    routers_s: Sequence[float]
    own_s: float
    engine_s: float


class SyntheticEngine:
    """Gives all sequences a token a step, once ``num_streams`` of them are there.

    Args:
        token_ids: said in turn by every sequence.
    """

    def __init__(self, num_streams: int, num_tokens: int, token_ids: Sequence[int], step_s: float) -> None:
        self._num_streams = num_streams
        self._num_tokens = num_tokens
        self._token_ids = token_ids
        self._step_s = step_s
        self._inbox: deque[Event] = deque()
        self._posted = threading.Event()
        self.made_s = np.zeros(num_tokens)
        """When each token was made, on the monotonic clock."""
        self.usages: list[Usage] = []
        """After ``WARM_STEPS``, and before the last ones."""

    def post(self, event: Event) -> None:
        self._inbox.append(event)
        self._posted.set()

    def load(self) -> Load:
        return Load(
            num_running=self._num_streams,
            num_waiting=0,
            kv_cache_usage=0.0,
            num_kv_blocks=1,
            outstanding_tokens=0,
            serving=True,
        )

    def start(self, deliver: Callable[[list[Output], Load], None], pids: Sequence[int]) -> threading.Thread:
        """Deliver on the event loop that runs. ``pids``: of the routers."""
        loop, routers = asyncio.get_running_loop(), [psutil.Process(pid) for pid in pids]

        def run() -> None:
            running = self._gather()
            began_s = time.monotonic()
            for step in range(self._num_tokens):
                time.sleep(max(0.0, began_s + (step + 1) * self._step_s - time.monotonic()))  # the work of a step
                if step in (WARM_STEPS, self._num_tokens - LAST_STEPS):
                    self.usages.append(_usage(routers))
                outputs = self._step(running, step)
                self.made_s[step] = time.monotonic()
                loop.call_soon_threadsafe(deliver, outputs, self.load())

        thread = threading.Thread(target=run, name="engine", daemon=True)
        thread.start()
        return thread

    def _gather(self) -> list[Running]:
        running: list[Running] = []
        while len(running) < self._num_streams:
            if not self._posted.wait(TIMEOUT_S):
                raise TimeoutError(f"{len(running)} of {self._num_streams} streams came within {TIMEOUT_S:g} s")
            self._posted.clear()
            while self._inbox:
                event = self._inbox.popleft()
                assert isinstance(event, Running), f"{event} before the first token"
                running.append(event)
        return running

    def _step(self, running: list[Running], step: int) -> list[Output]:
        token = self._token_ids[step % len(self._token_ids)]
        finish = LENGTH if step == self._num_tokens - 1 else UNFINISHED
        return [Output(sequence.link, sequence.handle, token, finish=finish) for sequence in running]


def _usage(routers: Sequence[psutil.Process]) -> Usage:
    times = [router.cpu_times() for router in routers]
    routers_s = [time.user + time.system for time in times]
    return Usage(routers_s=routers_s, own_s=time.process_time(), engine_s=time.thread_time())


def plain_tokens(config: MeshConfig) -> list[int]:
    """Ids of tokens that are ``CHARACTERS`` ASCII characters each."""
    tokenizer = Tokenizer.from_file(str(load_spec(config.model).path / "tokenizer.json"))
    texts = ((token_id, tokenizer.decode([token_id])) for token_id in range(tokenizer.get_vocab_size()))
    return [token_id for token_id, text in texts if len(text) == CHARACTERS and text.isascii() and text.isalpha()]


@contextmanager
def running_routers(folder: Path, balancer: str, num_routers: int, *, http: bool) -> Iterator[tuple[list[int], str]]:
    """The routers' process ids and the address of the door that is measured."""
    router: dict[str, Any] = {"http": {"enabled": http}}
    with ExitStack() as stack:
        if num_routers > 1:
            door = stack.enter_context(closing(SharedDoor(parse_config({"router": router}).router)))
            router["port"] = split_host_port(door.address)[1]
            if door.http_address is not None:
                router["http"]["port"] = split_host_port(door.http_address)[1]
        settings = {"router": router, "balancer": {"address": balancer}, "telemetry": {"metrics_port": 0}}
        file = folder / "mesh.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        shared = ["--share-port"] if num_routers > 1 else []
        started = [
            stack.enter_context(
                _router(folder, f"router-{number}", ["--config", str(file), "--stop-with-stdin", *shared])
            )
            for number in range(num_routers)
        ]
        yield [pid for pid, _ in started], started[0][1]["http" if http else "address"]


@contextmanager
def _router(folder: Path, server_id: str, options: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """A router's process id and what it says when it listens."""
    log_file = folder / f"{server_id}.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(  # ourselves
            [sys.executable, "-m", "expertmesh.cli.main", "serve", "router", "--id", server_id, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{server_id} did not start:\n" + log_file.read_text(encoding="utf-8"))
            yield process.pid, json.loads(line)
        finally:
            process.terminate()
            process.wait(30)


@dataclass(frozen=True, kw_only=True)
class Clients:
    """What they saw: ``arrived_s`` float64 [streams, tokens] on the monotonic clock."""

    arrived_s: np.ndarray
    num_messages: int
    cpu_s: float


async def run_clients(folder: Path, address: str, arguments: argparse.Namespace, num_streams: int) -> Clients:
    counts = [len(part) for part in np.array_split(np.arange(num_streams), arguments.clients)]
    files = [folder / f"client-{number}.npz" for number in range(len(counts))]
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--as-client", address, "--streams", str(count), "--tokens"),
            *(str(arguments.tokens), "--out", str(file), *(["--http"] if arguments.http else [])),
        )
        for count, file in zip(counts, files, strict=True)
    ]
    async with asyncio.timeout(TIMEOUT_S):
        statuses = await asyncio.gather(*(process.wait() for process in processes))
    if any(statuses):
        raise RuntimeError(f"clients ended with {statuses}")
    seen = [np.load(file) for file in files]
    return Clients(
        arrived_s=np.concatenate([part["arrived_s"] for part in seen]),
        num_messages=sum(int(part["num_messages"]) for part in seen),
        cpu_s=sum(float(part["cpu_s"]) for part in seen),
    )


async def measure(arguments: argparse.Namespace, num_streams: int) -> dict[str, Any]:
    config = parse_config({})
    spec = load_spec(config.model)
    engine = SyntheticEngine(num_streams, arguments.tokens, plain_tokens(config), arguments.step_ms / 1e3)
    # It has all that a service asks of its engine.
    service = AttentionService(cast(Engine, engine), spec, disabled_telemetry())

    def register(server: grpc.aio.Server) -> Sequence[str]:
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(service, server)
        return ["expertmesh.v1.AttentionService"]

    server = await rpc.start_server(
        host="127.0.0.1", port=0, tls=TlsConfig(), register=register, telemetry=disabled_telemetry()
    )
    balancer = await FakeBalancer().start()
    try:
        balancer.publish([_Member(address=server.address)])  # type: ignore[list-item]  # what it asks of a server
        with (
            tempfile.TemporaryDirectory() as name,
            running_routers(Path(name), balancer.address, arguments.routers, http=arguments.http) as (pids, address),
        ):
            print(f"{num_streams} streams through {pids}", file=sys.stderr, flush=True)  # for profilers
            thread = engine.start(service.deliver, pids)
            clients = await run_clients(Path(name), address, arguments, num_streams)
            await asyncio.to_thread(thread.join, TIMEOUT_S)
    finally:
        service.close()
        await balancer.stop()
        await server.stop(0.0)
    return row(engine, clients, num_streams, arguments.tokens)


@dataclass(frozen=True)
class _Member:
    address: str
    server_id: str = "attention-0"
    incarnation: str = "attention-0-1"


def row(engine: SyntheticEngine, clients: Clients, num_streams: int, num_tokens: int) -> dict[str, Any]:
    first, last = engine.usages
    counted = slice(WARM_STEPS, num_tokens - LAST_STEPS)
    made_s = engine.made_s[counted]
    tokens = num_streams * len(made_s)
    late_ms = 1e3 * (clients.arrived_s[:, counted] - made_s)
    routers_s = [after - before for before, after in zip(first.routers_s, last.routers_s, strict=True)]
    streaming_s = (last.own_s - first.own_s) - (last.engine_s - first.engine_s)
    return {
        "streams": num_streams,
        "tokens_per_s": round(tokens / float(made_s[-1] - made_s[0])),
        "router_us_per_token": round(1e6 * sum(routers_s) / tokens, 2),
        "router_cores": round(sum(routers_s) / float(made_s[-1] - made_s[0]), 3),
        "busiest_router_cores": round(max(routers_s) / float(made_s[-1] - made_s[0]), 3),
        "attention_us_per_token": round(1e6 * streaming_s / tokens, 2),
        "client_us_per_token": round(1e6 * clients.cpu_s / (num_streams * num_tokens), 2),
        "tokens_per_message": round(num_streams * num_tokens / clients.num_messages, 3),
        "late_ms": {name: round(float(np.percentile(late_ms, name)), 2) for name in (50, 90, 99)},
    }


async def client(arguments: argparse.Namespace) -> None:
    """One client process: all its streams on one connection, or on one each over HTTP."""
    num_streams, num_tokens = arguments.streams[0], arguments.tokens
    arrived_s = np.zeros((num_streams, num_tokens))
    read = _read_events if arguments.http else _read_messages
    async with GenerateClient(arguments.as_client) as grpc_client:
        source = arguments.as_client if arguments.http else grpc_client
        counts = await asyncio.gather(
            *(read(source, number, arrived_s[number]) for number in range(num_streams))  # type: ignore[operator]
        )
    np.savez(arguments.out, arrived_s=arrived_s, num_messages=sum(counts), cpu_s=time.process_time())


def _prompt(number: int) -> list[int]:
    return [(number * 7 + position) % 400 + 1 for position in range(PROMPT_TOKENS)]


async def _read_messages(source: GenerateClient, number: int, arrived_s: np.ndarray) -> int:
    """Note when each token came; returns the number of messages."""
    request = build_request(_prompt(number), max_tokens=len(arrived_s), ignore_eos=True, seed=number)
    seen = messages = 0
    async for response in source.stream(request, timeout_s=TIMEOUT_S):
        seen, messages = _note(arrived_s, seen, len(response.token_ids)), messages + 1
    assert seen == len(arrived_s), f"stream {number} has {seen} tokens"
    return messages


async def _read_events(source: str, number: int, arrived_s: np.ndarray) -> int:
    host, _, port = source.rpartition(":")
    asked = {"prompt": _prompt(number), "max_tokens": len(arrived_s), "ignore_eos": True, "stream": True}
    body = json.dumps(asked | {"seed": number}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        seen = messages = 0
        async with asyncio.timeout(TIMEOUT_S):
            while (line := await reader.readline()) != b"data: [DONE]\n":
                assert line, f"stream {number} broke after {seen} tokens"
                if line.startswith(b"data: "):
                    text = json.loads(line[6:])["choices"][0]["text"]
                    seen, messages = _note(arrived_s, seen, len(text) // CHARACTERS), messages + 1
    finally:
        writer.close()
    assert seen == len(arrived_s), f"stream {number} has {seen} tokens"
    return messages


def _note(arrived_s: np.ndarray, seen: int, more: int) -> int:
    arrived_s[seen : seen + more] = time.monotonic()
    return seen + more


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {"grpcio": grpc.__version__, "protobuf": google.protobuf.__version__},
        "command": " ".join(["python", "benchmarks/router_streams.py", *sys.argv[1:]]),
        "door": "http" if arguments.http else "grpc",
        "settings": {name: getattr(arguments, name) for name in ("step_ms", "tokens", "clients", "routers")},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--step-ms", type=float, default=18.0)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--clients", type=int, default=2, help="processes that share the streams")
    parser.add_argument("--routers", type=int, default=1, help="that share an address")
    parser.add_argument("--rounds", type=int, default=1, help="rows for each number of streams")
    parser.add_argument("--http", action="store_true", help="server-sent events instead of gRPC")
    parser.add_argument("--out", type=Path, default=None, help="where the result goes")
    parser.add_argument("--as-client", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_client:
        uvloop.run(client(arguments))
        return
    if arguments.tokens <= WARM_STEPS + LAST_STEPS + 1:
        parser.error(
            f"--tokens {arguments.tokens}: the first {WARM_STEPS} and last {LAST_STEPS} do not count: give more"
        )
    rows = []
    for num_streams in arguments.streams * arguments.rounds:
        rows.append(uvloop.run(measure(arguments, num_streams)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    text = json.dumps(report(arguments, rows), indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
