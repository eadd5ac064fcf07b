"""What a chat request pays for a template that is rendered in a process that it may kill.

    python benchmarks/chat_template.py --out benchmarks/results/chat_template.json

The same conversation through the same template: rendered here, by Jinja alone, and as a router does it. One after the
other (wall time of each), and many at once (CPU time of each, in this process and in the template's).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop

from expertmesh.mesh.chat_template_worker import new_environment
from expertmesh.router.chat_template import ChatTemplate
from expertmesh.v1.generate_pb2 import ChatInput, ChatMessage

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}<|assistant|>"
ROLE, CONTENT, NUM_MESSAGES = "user", "Why is the sky blue in the morning? " * 8, 5
MAX_BYTES = 2**22
ALONE, ROUNDS, AT_ONCE = 2000, 60, 50


def rendered_here_ms() -> float:
    template = new_environment().from_string(TEMPLATE)
    messages = [{"role": ROLE, "content": CONTENT}] * NUM_MESSAGES
    times = []
    for _ in range(ALONE):
        started_s = time.perf_counter()
        template.render(messages=messages)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times) * 1e3


async def rendered_apart() -> dict[str, Any]:
    template = ChatTemplate(TEMPLATE, {}, origin="benchmark")
    chat = ChatInput(messages=[ChatMessage(role=ROLE, content=CONTENT)] * NUM_MESSAGES)
    try:
        first_ms = (await _times_ms(template, chat, 1))[0]
        times_ms = await _times_ms(template, chat, ALONE)
        processes = [psutil.Process(), psutil.Process(template.worker.pid)]
        before_s = [_cpu_s(process) for process in processes]
        for _ in range(ROUNDS):
            await asyncio.gather(*(template.render(chat, MAX_BYTES) for _ in range(AT_ONCE)))
        cpu_ms = [(_cpu_s(process) - before) * 1e3 for process, before in zip(processes, before_s, strict=True)]
        return {
            "first_ms": first_ms,
            "p50_ms": statistics.median(times_ms),
            "p99_ms": statistics.quantiles(times_ms, n=100)[98],
            "router_cpu_ms": cpu_ms[0] / (ROUNDS * AT_ONCE),
            "template_cpu_ms": cpu_ms[1] / (ROUNDS * AT_ONCE),
            "template_rss_mib": processes[1].memory_info().rss / 2**20,
        }
    finally:
        await template.close()


async def _times_ms(template: ChatTemplate, chat: ChatInput, count: int) -> list[float]:
    times = []
    for _ in range(count):
        started_s = time.perf_counter()
        await template.render(chat, MAX_BYTES)
        times.append((time.perf_counter() - started_s) * 1e3)
    return times


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    result = {"here_p50_ms": rendered_here_ms(), **uvloop.run(rendered_apart())}
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
