"""Lockstep: before a step all ranks of a view agree what the step is.

A star over plain TCP: every rank tells the leader (rank 0) what it brings (``StepReady``); the leader answers all of
them with the step (``StepGo``). With nothing to do the leader holds its answer until somebody has work or the idle
tick is due, so an idle mesh costs almost nothing, a new request starts a step at once, and a dead or hung peer is
still noticed. A closed link is an error at once: this is how a rank learns within microseconds that another one died.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Iterable, Sequence

from expertmesh.mesh.errors import DataPlaneError
from expertmesh.mesh.framing import Link, Waker
from expertmesh.mesh.padding import first_tokens, padded_step
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

# Once a newer view is known, a peer that stays silent for so long is most likely the reason for it.
_SUPERSEDED_TIMEOUT_S = 0.5
ReadyFn = Callable[[], mesh_pb2.StepReady]
CommitsFn = Callable[[], Sequence[int]]


class Lockstep:
    """The lockstep of one view on one rank. All methods belong to the step thread."""

    def __init__(
        self,
        view: ViewInfo,
        links: dict[int, Link],
        waker: Waker,
        next_view: Callable[[], int],
        commits: CommitsFn,
        *,
        timeout_s: float,
        idle_tick_s: float,
        join_s: float = 0.0,
    ) -> None:
        """``join_s``: how long ranks may take to come to the first step, if that is longer than the time-out."""
        self._view = view
        self._links = links
        self._waker = waker
        self._next_view = next_view
        self._commits = commits
        self._timeout_s = timeout_s
        self._idle_tick_s = idle_tick_s
        self._join_s = join_s
        self._step = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(waker, selectors.EVENT_READ, None)
        for link in links.values():
            self._selector.register(link.sock, selectors.EVENT_READ, link)

    @property
    def step(self) -> int:
        """Number of the next step; the first is 0."""
        return self._step

    def exchange(self, ready: ReadyFn) -> mesh_pb2.StepGo:
        """Agree on the next step; returns when there is one.

        Args:
            ready: what this rank brings now; asked again whenever the waker fires while it has brought nothing.

        Raises:
            DataPlaneError: a link broke, or a peer was silent for longer than the time-out.
        """
        go = self._lead(ready) if self._view.rank == 0 else self._follow(ready)
        self._step += 1
        return go

    def _own(self, ready: ReadyFn) -> mesh_pb2.StepReady:
        self._waker.clear()
        message = ready()
        message.step = self._step
        message.next_view = self._next_view()
        message.commits.extend(self._commits())
        return message

    def _updated(self, own: mesh_pb2.StepReady, ready: ReadyFn) -> mesh_pb2.StepReady:
        """After a wake-up. Tokens that were announced stay announced: the step may already be under way elsewhere."""
        if not own.num_tokens:
            return self._own(ready)
        self._waker.clear()
        update = mesh_pb2.StepReady()
        update.CopyFrom(own)
        update.next_view = self._next_view()
        update.commits[:] = self._commits()
        return update

    def _patience_s(self, own: mesh_pb2.StepReady) -> float:
        """How long a peer may be silent."""
        if own.next_view > self._view.number:
            return min(self._timeout_s, _SUPERSEDED_TIMEOUT_S)
        return self._timeout_s if self._step else max(self._timeout_s, self._join_s)

    def _lead(self, ready: ReadyFn) -> mesh_pb2.StepGo:
        started = time.monotonic()
        readies = {0: self._own(ready)}
        for link in self._links.values():  # what came together with the message before
            self._take(link.rank, link.buffered(), readies)
        while True:
            waited = time.monotonic() - started
            complete = len(readies) == self._view.size
            if complete:
                if self._is_due(readies) or waited >= self._idle_tick_s:
                    break
                left = self._idle_tick_s - waited
            else:
                left = self._patience_s(readies[0]) - waited
                if left <= 0:
                    silent = tuple(rank for rank in range(self._view.size) if rank not in readies)
                    raise DataPlaneError(
                        f"ranks {list(silent)} were silent for {waited:.1f} s before step {self._step}", silent
                    )
            for key, _ in self._selector.select(left):
                if key.data is None:
                    readies[0] = self._updated(readies[0], ready)
                    continue
                self._take(key.data.rank, key.data.receive(), readies)
        return self._announce(readies)

    def _take(self, rank: int, payloads: Iterable[bytes], readies: dict[int, mesh_pb2.StepReady]) -> None:
        for payload in payloads:
            message = mesh_pb2.StepReady.FromString(payload)
            if message.step == self._step:  # an update that crossed the last StepGo is stale
                readies[rank] = message

    def _is_due(self, readies: dict[int, mesh_pb2.StepReady]) -> bool:
        return (
            any(message.num_tokens for message in readies.values())
            or self._ends(readies)
            or bool(_agreed_commits(readies))
        )

    def _ends(self, readies: dict[int, mesh_pb2.StepReady]) -> bool:
        return all(message.next_view > self._view.number for message in readies.values())

    def _announce(self, readies: dict[int, mesh_pb2.StepReady]) -> mesh_pb2.StepGo:
        go = mesh_pb2.StepGo(step=self._step, stop=self._ends(readies))
        if not go.stop:
            go.num_tokens.extend(readies[rank].num_tokens for rank in range(self._view.size))
            if any(message.first_tokens for message in readies.values()):
                go.first_tokens.extend(first_tokens(readies[rank]) for rank in range(self._view.size))
            go.traceparent = next((m.traceparent for m in readies.values() if m.traceparent), "")
            go.commits.extend(_agreed_commits(readies))
            padded = padded_step(readies.values())
            if padded is not None:
                go.padded_tokens, go.padded_chunks = padded.size, padded.has_chunks
        payload = go.SerializeToString()
        for link in self._links.values():
            link.send(payload)
        return go

    def _follow(self, ready: ReadyFn) -> mesh_pb2.StepGo:
        leader = self._links[0]
        own = self._own(ready)
        leader.send(own.SerializeToString())
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            left = self._idle_tick_s + self._patience_s(own) - waited
            if left <= 0:
                raise DataPlaneError(f"the leader was silent for {waited:.1f} s before step {self._step}", (0,))
            for key, _ in self._selector.select(left):
                if key.data is None:
                    update = self._updated(own, ready)
                    if update != own:
                        own = update
                        leader.send(own.SerializeToString())
                    continue
                for payload in leader.receive():
                    go = mesh_pb2.StepGo.FromString(payload)
                    assert go.step == self._step, f"leader is at step {go.step}, this rank at {self._step}"
                    return go

    def close(self) -> None:
        """Stop listening to the links; they belong to whoever made them."""
        self._selector.close()


def _agreed_commits(readies: dict[int, mesh_pb2.StepReady]) -> list[int]:
    """The migrations that every rank is ready to switch to."""
    agreed = set(readies[0].commits)
    for message in readies.values():
        if not agreed:  # almost always at once
            break
        agreed.intersection_update(message.commits)
    return sorted(agreed)
