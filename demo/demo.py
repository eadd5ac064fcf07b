"""What ``make demo`` shows, run inside a mesh: text in several domains, which server holds which expert, and that
neither a moving expert nor a killed server costs a token."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from expertmesh.cli.admin import placement_as_dict, status_as_dict
from expertmesh.cli.admin_loads import loads_as_dict
from expertmesh.mesh import rpc
from expertmesh.mesh.client import GenerateClient, build_request, status_line
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

TEXTS = {
    "stories": "Once there was a small turtle who wanted to see the mountain. Every morning",
    "novels": "Captain Harlow lit his pipe, looked out at the grey harbour, and",
    "german": "Am nächsten Morgen stand der alte Müller vor der Tür und",
    "french": "Le lendemain, la vieille servante ouvrit les volets et",
    "code": "def moving_average(values, window):",
    "dict": "teapot (noun):",
}
PROMPTS = Path(__file__).with_name("prompts.jsonl")
NUM_STREAMS = 8
NUM_TOKENS = 80
REQUEST_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 60.0
RECOVERY_TIMEOUT_S = 90.0
POLL_S = 0.1
EMPTY = -1


def title(text: str) -> None:
    print(f"\n--- {text}", flush=True)  # noqa: T201 - the demo speaks here


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)  # noqa: T201 - the demo speaks here


async def run(*arguments: str) -> None:
    """An ``expertmesh`` command, as one types it."""
    say(f"$ expertmesh {' '.join(arguments)}")
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments)
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SystemExit(f"demo: `expertmesh {' '.join(arguments)}` exited with {process.returncode}")


class Balancer:
    """What ``expertmesh balancer status|placement|loads --json`` print, without a process for each question."""

    def __init__(self, stub: admin_pb2_grpc.AdminServiceStub) -> None:
        self._stub = stub

    async def status(self) -> dict[str, Any]:
        return status_as_dict(await self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=COMMAND_TIMEOUT_S))

    async def placement(self) -> dict[str, Any]:
        request = admin_pb2.GetPlacementRequest()
        return placement_as_dict(await self._stub.GetPlacement(request, timeout=COMMAND_TIMEOUT_S))

    async def loads(self) -> dict[str, Any]:
        return loads_as_dict(await self._stub.GetLoads(admin_pb2.GetLoadsRequest(), timeout=COMMAND_TIMEOUT_S))

    async def members(self) -> set[str]:
        """Ids of the ranks of the view that serves; empty while none does."""
        status = await self.status()
        return {s["id"] for s in status["servers"] if s["rank"] is not None} if status["serving"] else set()

    async def kill(self, server_id: str) -> dict[str, Any]:
        """SIGKILL, as ``kill -9`` sends it; gives the server as it was."""
        server: dict[str, Any] = next(s for s in (await self.status())["servers"] if s["id"] == server_id)
        say(f"$ kill -9 {server['pid']}    # {server_id}")
        os.kill(server["pid"], signal.SIGKILL)
        return server

    async def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Until the mesh serves and its status is such; gives up after ``RECOVERY_TIMEOUT_S``."""
        started_s = time.monotonic()
        while not ((status := await self.status())["serving"] and condition(status)):
            if time.monotonic() - started_s > RECOVERY_TIMEOUT_S:
                raise SystemExit(f"demo: after {RECOVERY_TIMEOUT_S:.0f} s still not: {what}; {status['reason']}")
            await asyncio.sleep(POLL_S)
        say(f"{what}: view {status['view']}, {time.monotonic() - started_s:.1f} s later")


async def show_texts(client: GenerateClient) -> None:
    for domain, prompt in TEXTS.items():
        title(domain)
        say(f'$ expertmesh generate "{prompt}" --max-tokens 40 --temperature 0.7 --seed 7')
        say(prompt, end="")
        request = build_request(prompt, max_tokens=40, temperature=0.7, seed=7)
        async for message in client.stream(request, timeout_s=REQUEST_TIMEOUT_S):
            say(message.text, end="")
        say("")


@dataclass
class Streams:
    """Greedy requests that are asked again and again, each answer compared with what the same prompt got before."""

    client: GenerateClient
    prompts: list[str]
    expected: list[list[int]] = field(default_factory=list)
    num_answers: int = 0
    num_tokens: int = 0
    num_wrong: int = 0
    num_lost: int = 0
    num_replays: int = 0
    longest_gap_s: float = 0.0

    async def learn(self) -> None:
        """The answers of an undisturbed mesh."""
        self.expected = await asyncio.gather(*(self._answer(prompt) for prompt in self.prompts))
        self.longest_gap_s = 0.0
        self.num_replays = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Every prompt has a request under way until the block ends; those that run then come to their end."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for prompt, expected in zip(self.prompts, self.expected, strict=True):
                group.create_task(self._repeat(prompt, expected, over))
            try:
                yield
            finally:
                over.set()

    async def _repeat(self, prompt: str, expected: list[int], over: asyncio.Event) -> None:
        while not over.is_set():
            try:
                answer = await self._answer(prompt)
            except grpc.aio.AioRpcError as error:
                self.num_lost += 1
                say(f"lost: {status_line(error)}")
                return
            self.num_answers += 1
            self.num_tokens += len(answer)
            self.num_wrong += answer != expected

    async def _answer(self, prompt: str) -> list[int]:
        """
        Raises:
            grpc.aio.AioRpcError: the request was lost.
        """
        request = build_request(prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        token_ids: list[int] = []
        arrived_s: list[float] = []
        async for message in self.client.stream(request, timeout_s=REQUEST_TIMEOUT_S):
            arrived_s.append(time.monotonic())
            token_ids += message.token_ids
            self.num_replays += message.finish.replays
        self.longest_gap_s = max(
            self.longest_gap_s, *(after - before for before, after in itertools.pairwise(arrived_s))
        )
        return token_ids


async def move_an_expert(balancer: Balancer) -> None:
    """In mode ``online`` the balancer decides on such moves itself; here it is asked for one."""
    layer, expert, busy, calm = next(moves(await balancer.loads(), await balancer.placement()))
    say(f"in layer {layer} {busy} has most to do and {calm} least: the most used expert of {busy} goes to {calm}")
    await run("balancer", "move", str(layer), str(expert), calm, "--from", busy)
    await run("balancer", "placement", str(layer))
    say("(after `expertmesh balancer mode online` the balancer decides on such moves by itself)")


def moves(loads: dict[str, Any], placement: dict[str, Any]) -> Iterator[tuple[int, int, str, str]]:
    """(layer, expert, from, to), the best one first: the layer that is balanced worst, its busiest server's most used
    expert, its least busy server with a free slot."""
    tables = {table["layer"]: list(zip(table["ranks"], table["slots"], strict=True)) for table in placement["layers"]}
    for layer in sorted(loads["layers"], key=lambda layer: layer["balancedness"]):
        calm_to_busy = [server for _, server in sorted(zip(layer["rank_load"], loads["servers"], strict=True))]
        held = {name: {e for server, e in tables[layer["layer"]] if server == name} for name in calm_to_busy}
        busy = calm_to_busy[-1]
        for calm in calm_to_busy[:-1]:
            movable = held[busy] - held[calm] - {EMPTY}
            if movable and EMPTY in held[calm]:
                yield layer["layer"], max(movable, key=lambda expert: layer["load"][expert]), busy, calm


def leaves(killed: dict[str, Any]) -> Callable[[dict[str, Any]], bool]:
    return lambda status: (
        killed["incarnation"]
        not in {server["incarnation"] for server in status["servers"] if server["rank"] is not None}
    )


def has_all(names: set[str]) -> Callable[[dict[str, Any]], bool]:
    return lambda status: names == {server["id"] for server in status["servers"] if server["rank"] is not None}


async def disturb(client: GenerateClient, balancer: Balancer) -> int:
    """The exit status: 1 when a token was lost or changed."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:: len(lines) // NUM_STREAMS][:NUM_STREAMS]]
    streams = Streams(client, prompts)
    await streams.learn()
    names = await balancer.members()
    async with streams.running():
        title(f"{NUM_STREAMS} streams run from here on; meanwhile an expert moves to another server")
        await move_an_expert(balancer)
        title("an expert server is killed, then an attention server")
        expert, attention = (max(name for name in names if name.startswith(role)) for role in ("expert", "attention"))
        await balancer.until(leaves(await balancer.kill(expert)), f"the others serve without {expert}")
        await balancer.until(leaves(await balancer.kill(attention)), f"the others serve without {attention}")
        await balancer.until(has_all(names), "both were started again and are back")
    title("what the streams saw")
    say(
        f"{streams.num_answers} answers of {NUM_TOKENS} tokens, {streams.num_replays} of which went on at another "
        f"attention server; {NUM_TOKENS * (streams.num_answers + streams.num_lost)} tokens expected, "
        f"{streams.num_tokens} received; {streams.num_lost} requests lost; {streams.num_wrong} answers differ from "
        "those of the undisturbed mesh\n"
        f"longest pause between two tokens of a stream: {streams.longest_gap_s:.2f} s"
    )
    return int(streams.num_wrong + streams.num_lost > 0)


async def main() -> int:
    async with (
        GenerateClient(os.environ["EXPERTMESH_ROUTER"]) as client,
        rpc.open_channel(os.environ["EXPERTMESH_BALANCER"], TlsConfig()) as channel,
    ):
        balancer = Balancer(admin_pb2_grpc.AdminServiceStub(channel))
        await show_texts(client)
        title("which servers there are, and which experts they hold")
        await run("balancer", "status")
        await run("balancer", "placement")
        status = await disturb(client, balancer)
    title("what the balancer has to say")
    await run("balancer", "events")
    return status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
