"""Weights from one expert rank to another, beside the data plane: a gloo group of its own that no step waits for.

A gloo group does not survive a wait that timed out: it closes the links of all pairs. So nobody waits in gloo before
both ends have agreed on the transfer through one key of the rendezvous store, changed by compare-and-set only:

    (absent) ── destination ──▶ want ── source ──▶ go CHECKSUM PARTS ── the bytes move, the destination deletes it
        └──────── either ────▶ void ◀── either ──┘

Either end may call a transfer off for as long as it pleases it; once the source has said ``go`` both go through with
it. What is left to wait for in gloo is a peer that died, which its link shows, or that hangs, which ends the view.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

from expertmesh.mesh.config import DataPlaneConfig
from expertmesh.mesh.dataplane.collective import PointToPoint
from expertmesh.mesh.dataplane.factory import connect_gloo
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.view import ViewInfo

log = logging.getLogger(__name__)

_WANT, _VOID, _GO = b"want", b"void", b"go"
_SHORTEST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.005
_FIRST_TAG = 1


class TransferError(RuntimeError):
    """The weights did not come; ``cause`` is ``called_off``, ``broken`` or ``checksum``."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait: until a monotonic time, or until somebody calls it off."""

    called_off: threading.Event
    deadline_s: float

    @property
    def left_s(self) -> float:
        return 0.0 if self.called_off.is_set() else self.deadline_s - time.monotonic()

    def poll(self, is_done: Callable[[], bool]) -> bool:
        """Ask until it is done (True) or patience is over."""
        pause_s = _SHORTEST_PAUSE_S
        while not is_done():
            left_s = self.left_s
            if left_s <= 0:
                return False
            self.called_off.wait(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return True

    def half(self) -> Patience:
        """With half of the time that is left: so that something else can be tried in the other half."""
        return replace(self, deadline_s=self.deadline_s - max(0.0, self.left_s) / 2)


def checksum(weights: ExpertWeights) -> int:
    """CRC-32 over the bytes of all parts."""
    value = 0
    for part in weights:
        value = zlib.crc32(part.view(torch.uint8).numpy().data, value)
    return value


class SideGroup:
    """The expert ranks of one view as they hand weights to each other. All methods belong to one thread.

    Ranks are expert-rank indices. Once a transfer failed in the middle the group is ``broken``, for as long as the
    view lasts.

    Args:
        store: connects to the rendezvous store; the keys are this group's alone.
        connect: connects to all ranks, which are known to be there.
        timeout_s: how long a peer may be silent in the middle of a transfer.
    """

    def __init__(
        self,
        *,
        index: int,
        size: int,
        store: Callable[[], Store],
        connect: Callable[[Store], PointToPoint],
        timeout_s: float,
    ) -> None:
        self._index = index
        self._size = size
        self._open_store = store
        self._connect = connect
        self._timeout = timedelta(seconds=timeout_s)
        self._store: Store | None = None
        self._group: PointToPoint | None = None
        self.broken = "it is not open yet"

    def open(self, patience: Patience) -> None:
        """Meet the other ranks and connect to them. When that fails, the group is broken."""
        started_s = time.monotonic()
        try:
            self._store = store = self._open_store()
            store.set(f"here/{self._index}", "")
            if not patience.poll(lambda: store.check([f"here/{rank}" for rank in range(self._size)])):
                self._break("not all expert ranks came to it in time")
                return
            self._group = self._connect(store)
        except RuntimeError as error:  # torch.distributed's errors derive from it
            self._break(f"it could not be built: {error}")
            return
        self.broken = ""
        log.info("side group of %d expert ranks in %.0f ms", self._size, 1e3 * (time.monotonic() - started_s))

    def give(self, name: str, weights: ExpertWeights, to: int, patience: Patience) -> bool:
        """Send weights when ``to`` asks for them; False when they were not wanted or did not get there.

        The weights must hold still until this returns.
        """
        try:
            if self._store is None:
                return False
            go = f"go {checksum(weights)} {_description(weights)}"
            if not self._agree_to_send(self._store, name, go, patience):
                return False
            assert self._group is not None, "a broken group agrees to nothing"
            works = [self._group.send([part], to, _FIRST_TAG + i) for i, part in enumerate(weights)]
            for work in works:
                work.wait(self._timeout)
            return True
        except RuntimeError as error:
            self._break(f"sending to expert rank {to} failed: {error}")
            return False

    def take(self, name: str, into: ExpertWeights, source: int, patience: Patience) -> None:
        """Receive what ``source`` gives under the same name, and verify it.

        Raises:
            TransferError: ``into`` holds nothing of use, and nothing writes to it any more.
        """
        try:
            if self._store is None:
                raise TransferError(f"the side group is broken: {self.broken}", "broken")
            go = self._agree_to_receive(self._store, name, patience)
            if go is None:
                why = f"the side group is broken: {self.broken}" if self.broken else "it was called off"
                raise TransferError(f"nothing comes from expert rank {source}: {why}", "called_off")
            _, expected, description = go.decode().split(" ", 2)
            if description != _description(into):
                self._break(f"expert rank {source} sends {description} instead of {_description(into)}")
                raise TransferError(self.broken, "broken")
            assert self._group is not None, "a broken group agrees to nothing"
            works = [self._group.recv([part], source, _FIRST_TAG + i) for i, part in enumerate(into)]
            for work in works:
                work.wait(self._timeout)
            self._store.delete_key(name)
        except TransferError:
            raise
        except RuntimeError as error:
            self._break(f"receiving from expert rank {source} failed: {error}")
            raise TransferError(self.broken, "broken") from error
        found = checksum(into)
        if found != int(expected):
            raise TransferError(f"what expert rank {source} sent has checksum {found}, not {expected}", "checksum")

    def close(self) -> None:
        self.broken = "it is closed"
        self._group = None
        self._store = None

    def _agree_to_send(self, store: Store, name: str, go: str, patience: Patience) -> bool:
        asked = not self.broken and patience.poll(lambda: store.check([name]))
        said = store.get(name) if asked else store.compare_set(name, "", _VOID.decode())
        if said == _WANT:
            desired = _VOID.decode() if self.broken or patience.left_s <= 0 else go
            said = store.compare_set(name, _WANT.decode(), desired)
            return said == go.encode()
        if asked:  # the other end called it off, and has gone
            store.delete_key(name)
        return False

    def _agree_to_receive(self, store: Store, name: str, patience: Patience) -> bytes | None:
        said = store.compare_set(name, "", (_VOID if self.broken else _WANT).decode())

        def is_answered() -> bool:
            nonlocal said
            if said == _WANT:
                said = store.get(name)
            return said != _WANT

        if not patience.poll(is_answered):
            said = store.compare_set(name, _WANT.decode(), _VOID.decode())
        return said if said.startswith(_GO) else None

    def _break(self, reason: str) -> None:
        if not self.broken or self._group is None:
            log.warning("the side group is broken, weights come from the checkpoint: %s", reason)
        self.broken = reason


def open_side_group(config: DataPlaneConfig, view: ViewInfo) -> SideGroup:
    """The side group of a view's expert ranks, of which this rank is one. Nothing is connected before ``open``."""
    index, size = view.expert_index, len(view.expert_ranks)
    assert index is not None, "only expert ranks hand weights to each other"
    timeout = timedelta(seconds=config.timeout_s)
    host, _, port = view.proto.store_address.rpartition(":")

    def store() -> Store:
        client = TCPStore(host.strip("[]"), int(port), is_master=False, timeout=timeout, wait_for_workers=False)
        return PrefixStore(f"view/{view.number}/side/", client)

    def connect(store: Store) -> PointToPoint:
        return connect_gloo(PrefixStore("gloo/", store), index, size, config)

    return SideGroup(index=index, size=size, store=store, connect=connect, timeout_s=config.timeout_s)


def _description(weights: Sequence[torch.Tensor]) -> str:
    return " ".join(f"{part.dtype}{list(part.shape)}".replace(" ", "") for part in weights)
