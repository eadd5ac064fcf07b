"""How long a request may stand still: without a mesh, past its deadline, behind a client that reads nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from expertmesh.mesh.config import RouterConfig
from expertmesh.router.errors import Refusal
from expertmesh.router.generation import Generation
from expertmesh.router.links import AttentionLink

# A request that waits for a mesh is told why a little before its deadline, after which the client would not hear it.
_DEADLINE_MARGIN_S = 0.25
_NEVER = float("inf")
_SHORTEST_S = 0.001  # the resolution of the loop's timers: one that comes early is not set again for no time at all


class Patience:
    """Ends a request that stands still for too long, from ``look`` to ``end``.

    One timer, which sees when it comes how much longer there is to wait: the tokens and messages of the meantime do not
    touch it.

    Args:
        deadline_s: on ``time.monotonic``; None = none.
        stalled: what is left to end while the client reads nothing.
        why_not_serving: for a request that finds no server.
    """

    def __init__(
        self,
        generation: Generation,
        config: RouterConfig,
        deadline_s: float | None,
        stalled: asyncio.Timeout,
        why_not_serving: Callable[[], str],
    ) -> None:
        self._generation = generation
        self._config = config
        self._deadline_s = deadline_s
        self._stalled: asyncio.Timeout | None = stalled
        self._why_not_serving = why_not_serving
        self._progress: tuple[int, float] | None = None
        self._homeless_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.link: AttentionLink | None = None
        """To the server that has the request, or had it last."""
        self.emitting_since_s: float | None = None
        """When the message was given to the client that it has not taken yet."""

    def look(self) -> None:
        """End the request if it is time to, else look again when it may be.

        To be called when it has been given to a server, and when it has none: only that can bring its end nearer.
        """
        self._stop()
        now_s = time.monotonic()
        if now_s >= self._ends_s(now_s):
            self._give_up()
        since_s = now_s if self.emitting_since_s is None else self.emitting_since_s
        stalls_s = since_s + self._config.client_stall_timeout_s
        loop = asyncio.get_running_loop()
        if now_s >= stalls_s:
            assert self._stalled is not None, "it looks no more once it has ended"
            self._stalled.reschedule(loop.time())
            return
        wait_s = min(self._ends_s(now_s), stalls_s) - now_s
        self._timer = loop.call_later(max(wait_s, _SHORTEST_S), self.look)

    def end(self) -> None:
        """The request is over. A time-out keeps its task, and that the error that it was cancelled with."""
        self._stop()
        self._stalled = None

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ends_s(self, now_s: float) -> float:
        """When there is something to say if nothing happens before."""
        generation, link = self._generation, self.link
        if generation.ended:
            return _NEVER
        if generation.needs_server:
            self._note_homeless(now_s)
            if self._deadline_s is None:
                return self._homeless_since_s + self._config.no_capacity_timeout_s
            return self._deadline_s - _DEADLINE_MARGIN_S
        if self._deadline_s is not None:
            return self._deadline_s
        since_s = now_s if link is None or link.serving else link.not_serving_since_s
        return since_s + self._config.no_capacity_timeout_s

    def _note_homeless(self, now_s: float) -> None:
        """Servers that refuse the request one after the other are no home: only tokens and replays are progress."""
        progress = (self._generation.replays, self._generation.last_token_s)
        if progress != self._progress:
            self._progress, self._homeless_since_s = progress, now_s

    def _give_up(self) -> None:
        """Long silence is an answer when there is no mesh that could end it, or no time left."""
        if self._generation.needs_server or (self.link is not None and not self.link.serving):
            self._generation.fail(Refusal(grpc.StatusCode.UNAVAILABLE, self._why_not_serving()))
        else:
            message = "the deadline came before the end; raise it or lower sampling_params.max_tokens"
            self._generation.fail(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, message))
