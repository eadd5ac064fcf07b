"""Requests whose prompt somebody else computed: their KV blocks are fetched before the engine hears of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from expertmesh.attention_server.engine import Engine
from expertmesh.attention_server.kv_handover import fetch_blocks
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.kv_transport import HandoverError, KvSource, Transport
from expertmesh.attention_server.request import Sequence
from expertmesh.mesh.rank_security import RankSecurity
from expertmesh.mesh.telemetry import Metrics

log = logging.getLogger(__name__)

MAX_AT_ONCE = 16
"""Fetches under way; the others wait for their turn, within their own time."""


class Fetching:
    """Fetches, then posts. What cannot be fetched the engine computes, so that nothing here fails a request.

    Args:
        transport: how blocks come.
        timeout_s: a sequence is posted after so long, with whatever has come.
        changed: called when a sequence has been posted or forgotten.
        security: of the connection to who computed it; None = in the clear.
    """

    def __init__(
        self,
        engine: Engine,
        memory: BlockMemory,
        transport: Transport,
        metrics: Metrics,
        timeout_s: float,
        changed: Callable[[], None],
        security: RankSecurity | None = None,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._transport = transport
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._changed = changed
        self._security = security
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._unwanted: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        """Sequences that the engine has not heard of yet."""
        return len(self._tasks)

    def start(self, sequence: Sequence, source: KvSource) -> None:
        key = (sequence.link, sequence.handle)
        if key in self._tasks:
            self._engine.post(sequence)  # which refuses the handle
            return
        task = asyncio.create_task(self._fetch(sequence, source), name=f"kv-fetch-{sequence.request_id}")
        self._tasks[key] = task
        task.add_done_callback(partial(self._ended, sequence))

    def abort(self, link: int, handle: int) -> bool:
        """Forget a sequence; False when it is none of these."""
        task = self._tasks.get((link, handle))
        if task is None:
            return False
        self._unwanted.add((link, handle))
        task.cancel()
        return True

    def unlink(self, link: int) -> None:
        for key in [key for key in self._tasks if key[0] == link]:
            self.abort(*key)

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for key in list(self._tasks):
            self.abort(*key)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, sequence: Sequence, source: KvSource) -> None:
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s), self._turns:
                digests, desk = self._engine.prefix_digests(sequence), self._engine.prefixes
                count = await fetch_blocks(source, digests, self._memory, desk, self._transport, self._security)
        except (HandoverError, TimeoutError) as error:
            reason = str(error) or f"{source.address} did not give them within {self._timeout_s:g} s"
            log.warning("request %s: KV blocks are computed anew: %s", sequence.request_id, reason)
            self._metrics.kv_handover_failures.add()
            if sequence.trace is not None:
                sequence.trace.prepared("kv handover", {"expertmesh.kv.blocks": 0, "error.type": type(error).__name__})
            return
        self._metrics.kv_handover_blocks.add(count)
        exemplar = sequence.trace.traceparent if sequence.trace is not None else ""
        self._metrics.kv_handover_seconds.observe(time.monotonic() - started_s, exemplar)
        if sequence.trace is not None:
            sequence.trace.prepared("kv handover", {"expertmesh.kv.blocks": count})

    def _ended(self, sequence: Sequence, task: asyncio.Task[None]) -> None:
        """However it ended: only a sequence that nobody wants any more is not posted."""
        key = (sequence.link, sequence.handle)
        del self._tasks[key]
        if not task.cancelled() and task.exception() is not None:
            log.error("request %s: fetching KV blocks failed", sequence.request_id, exc_info=task.exception())
        if key in self._unwanted:
            self._unwanted.discard(key)
            if sequence.trace is not None:
                sequence.trace.refused("aborted while its KV blocks were fetched")
        else:
            self._engine.post(sequence)
        self._changed()
