"""What a rank has heard from the balancer: the way from its event loop to its step thread."""

from __future__ import annotations

import threading

from expertmesh.mesh.framing import Waker
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2


class Inbox:
    """What the event loop has heard from the balancer, for the step thread. Thread-safe."""

    def __init__(self, waker: Waker) -> None:
        self._changed = threading.Condition()
        self._waker = waker
        self._view: ViewInfo | None = None
        self._known_view = 0
        self._closed = False
        self.pause_reason = ""
        self.is_fenced = False

    def put_view(self, proto: mesh_pb2.View, server_id: str, incarnation: str) -> None:
        """A view was published, with or without this rank."""
        with self._changed:
            if proto.number <= self._known_view:
                return
            self._known_view = proto.number
            self._view = ViewInfo.for_server(proto, server_id, incarnation)
            self.is_fenced = self.is_fenced and self._view is None
            self.pause_reason = "" if self._view is not None else f"view {proto.number} goes on without this server"
            self._changed.notify_all()
        self._waker.wake()

    def put_pause(self, reason: str) -> None:
        with self._changed:
            self.pause_reason = reason
            self._changed.notify_all()

    def fence(self, reason: str) -> None:
        """This incarnation is out: its view must end, whatever the other ranks know."""
        with self._changed:
            self._view = None
            self.is_fenced = True
            self.pause_reason = reason
            self._changed.notify_all()
        self._waker.wake()

    def close(self) -> None:
        """The process is stopping."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._waker.wake()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def known_view(self) -> int:
        """Number of the newest view that this process has heard of."""
        return self._known_view

    def next_view(self, after: int, timeout_s: float) -> ViewInfo | None:
        """The newest view if it is newer than ``after`` and has this rank; waits for one up to the time-out."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_newer(after), timeout_s)
            return self._view if not self._closed and self._has_newer(after) else None

    def _has_newer(self, after: int) -> bool:
        return self._view is not None and self._view.number > after
