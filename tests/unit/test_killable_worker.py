"""Processes that may be killed: how they start beside gRPC and uvloop, and what a lost pipe to one means."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from expertmesh.mesh.killable_worker import KillableWorker, LostError, WorkerLimits

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
LIMITS = WorkerLimits(cpu_s=1.0, memory_bytes=2**20)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_process_that_is_gone_before_it_is_told_anything(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Writing to it fails, and asyncio and uvloop do not agree on the error."""
    start = asyncio.create_subprocess_exec

    async def start_and_see_it_end(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*command, **options)
        await asyncio.wait_for(process.wait(), TIMEOUT_S)
        return process

    async def ask() -> None:
        command = (sys.executable, "-c", "raise SystemExit(7)")
        worker = KillableWorker("a.worker", {}, LIMITS, verb="work", max_pending=1, command=command)
        with pytest.raises(LostError, match="it ended with status 7"):
            await asyncio.wait_for(worker.ask({}), TIMEOUT_S)
        assert worker.pid is None
        await worker.close()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_see_it_end)
    with contextlib.closing(new_loop()) as loop:
        loop.run_until_complete(ask())
    assert "the process is lost, another one is started" in caplog.text


@pytest.mark.security
async def test_the_process_has_no_secret_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPERTMESH_API_KEY", "EXPERTMESH_ETCD_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "a secret")
    script = """
        import json, os, sys
        for line in sys.stdin:
            print(json.dumps({"unusable": None, "environment": dict(os.environ)}), flush=True)
    """
    command = (sys.executable, "-c", textwrap.dedent(script))
    worker = KillableWorker("a.worker", {}, LIMITS, verb="work", max_pending=1, command=command)
    try:
        answer = await asyncio.wait_for(worker.ask({}), TIMEOUT_S)
    finally:
        await worker.close()
    assert "a secret" not in answer["environment"].values()
    assert "PATH" in answer["environment"]


def test_children_start_beside_grpc() -> None:
    """With gRPC's handlers of forks, some of the children that uvloop starts die before they are a program."""
    script = """
        import expertmesh, asyncio, contextlib, subprocess
        import grpc, uvloop

        async def main() -> None:
            server = grpc.aio.server()
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/nobody/Implements")
                async def speak() -> None:
                    while True:
                        with contextlib.suppress(grpc.aio.AioRpcError):
                            await call(b"x", timeout=30)
                speakers = [asyncio.create_task(speak()) for _ in range(3)]
                statuses = set()
                for _ in range(400):
                    child = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                    await asyncio.wait_for(child.communicate(b""), 30)
                    statuses.add(child.returncode)
                for speaker in speakers:
                    speaker.cancel()
                await asyncio.wait(speakers, timeout=30)
            await server.stop(None)
            print(statuses)

        uvloop.run(main())
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(script)]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ran.stdout == "{0}\n", ran
