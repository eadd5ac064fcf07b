"""The links to every attention server of the current view, and the choice among them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from expertmesh.mesh.config import TlsConfig
from expertmesh.router.generation import Generation
from expertmesh.router.links import AttentionLink
from expertmesh.router.selection import Candidate, choose
from expertmesh.v1 import attention_pb2, mesh_pb2

log = logging.getLogger(__name__)

# A server that drained leaves the view while its last tokens may still be under way to us.
_RETIRE_GRACE_S = 1.0

_ServerKey = tuple[str, str, str]  # server id, incarnation, address


@dataclass(frozen=True, slots=True)
class _Running:
    link: AttentionLink
    task: asyncio.Task[None]


class LinkPool:
    """Follows the views. With the balancer gone, the last view stays.

    Args:
        hello: what the router says of itself on each link.
        on_change: called whenever ``any_serving`` may have changed.
    """

    def __init__(
        self,
        *,
        hello: attention_pb2.LinkHello,
        tls: TlsConfig,
        affinity_tokens: int,
        slack_tokens: int,
        on_change: Callable[[], None],
    ) -> None:
        self._hello = hello
        self._tls = tls
        self._affinity_tokens = affinity_tokens
        self._slack_tokens = slack_tokens
        self._on_change = on_change
        self._draw = random.Random()
        self._members: dict[_ServerKey, _Running] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._pause_reason = ""
        self._waiting: set[Generation] = set()
        self.view_traceparent = ""
        """Of the change to the current view."""

    @property
    def any_serving(self) -> bool:
        return any(member.link.serving for member in self._members.values())

    @property
    def num_serving(self) -> int:
        """Attention servers that serve."""
        return sum(member.link.serving for member in self._members.values())

    @property
    def links(self) -> Sequence[AttentionLink]:
        """Of the current view."""
        return [member.link for member in self._members.values()]

    @property
    def num_unplaced(self) -> int:
        """Requests of this router that wait for an attention server."""
        return len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Requests, of all routers, that wait on the attention servers for a place in a batch."""
        return sum(link.num_waiting for link in self.links)

    def set_view(self, view: mesh_pb2.View) -> None:
        """Connect to the view's attention servers; servers that it no longer has take nothing new and are let go."""
        self._pause_reason = ""
        self.view_traceparent = view.traceparent
        wanted: dict[_ServerKey, mesh_pb2.Rank] = {
            (rank.server_id, rank.incarnation, rank.grpc_address): rank
            for rank in view.ranks
            if rank.role in (mesh_pb2.ROLE_ATTENTION, mesh_pb2.ROLE_BOTH)
        }
        for key in self._members.keys() - wanted.keys():
            self._retire(self._members.pop(key))
        for key in wanted.keys() - self._members.keys():
            rank = wanted[key]
            link = AttentionLink(
                server_id=rank.server_id,
                address=rank.grpc_address,
                role=mesh_pb2.Role.Name(rank.role).removeprefix("ROLE_").lower(),
                hello=self._hello,
                tls=self._tls,
                on_change=self._changed,
            )
            task = asyncio.create_task(link.run(), name=f"link-{rank.server_id}")
            self._members[key] = _Running(link, task)
        log.info("view %d: attention servers %s", view.number, ", ".join(sorted(key[0] for key in wanted)) or "none")
        self._changed()

    def set_pause(self, reason: str) -> None:
        """The balancer can form no view; waiting requests learn why."""
        self._pause_reason = reason
        log.log(logging.WARNING if self._members else logging.INFO, "the mesh pauses: %s", reason)

    def choose(self, prompt_token_ids: Sequence[int], *, avoid: Collection[str] = ()) -> AttentionLink | None:
        """The link for a prompt; ``None`` when no server serves.

        Args:
            avoid: server ids that are taken only when there is no other.
        """
        serving = {link.server_id: link for link in self.links if link.serving}
        candidates = [
            Candidate(server_id=link.server_id, outstanding_tokens=link.outstanding_tokens) for link in serving.values()
        ]
        preferred = [candidate for candidate in candidates if candidate.server_id not in avoid]
        chosen = choose(
            preferred or candidates,
            prompt_token_ids,
            affinity_tokens=self._affinity_tokens,
            slack_tokens=self._slack_tokens,
            draw=self._draw if any(link.num_routers > 1 for link in serving.values()) else None,
        )
        return serving[chosen.server_id] if chosen is not None else None

    def notify(self, generation: Generation) -> None:
        """Wake ``generation`` when there may be a server for it; ``forget`` when it no longer waits."""
        self._waiting.add(generation)

    def forget(self, generation: Generation) -> None:
        self._waiting.discard(generation)

    def why_not_serving(self) -> str:
        """For people: why ``choose`` finds nothing."""
        if self._pause_reason:
            return f"the mesh pauses: {self._pause_reason}"
        if not self._members:
            return "no attention server is in a view yet; ask `expertmesh balancer status`"
        problems = (f"{link.server_id}: {link.problem}" for link in self.links if not link.serving)
        return f"no attention server serves ({'; '.join(problems)})"

    async def close(self) -> None:
        """End every link; what still runs on them is lost."""
        tasks = [*self._retiring, *(member.task for member in self._members.values())]
        self._members.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _retire(self, member: _Running) -> None:
        member.link.retired = True
        task = asyncio.create_task(_let_go(member), name=f"retire-{member.link.server_id}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _changed(self) -> None:
        self._on_change()
        waiting, self._waiting = self._waiting, set()
        for generation in waiting:
            generation.wake()


async def _let_go(member: _Running) -> None:
    """Give the last tokens a moment to arrive, then end the link: a server out of the view makes no more."""
    try:
        await member.link.wait_idle(_RETIRE_GRACE_S)
    except TimeoutError:
        log.info("attention server %s left the view with requests running", member.link.server_id)
    finally:
        member.task.cancel()
        await asyncio.wait([member.task], timeout=_RETIRE_GRACE_S)
