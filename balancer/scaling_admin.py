"""What administrators and launchers ask about the number of servers. Nothing of gRPC but status codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable

from expertmesh.balancer.draining import Draining
from expertmesh.balancer.scaling_target import ScaleTargets
from expertmesh.v1 import admin_pb2


class ScaleAdmin:
    """
    Args:
        wake: runs the reconcile loop soon.
    """

    def __init__(self, targets: ScaleTargets, draining: Draining, *, policy: str, wake: Callable[[], None]) -> None:
        self._targets = targets
        self._draining = draining
        self._policy = policy
        self._wake = wake

    def set(self, request: admin_pb2.SetScaleRequest) -> admin_pb2.SetScaleResponse:
        """
        Raises:
            RefusedError: see ``ScaleTargets.request``.
        """
        self._targets.request(request)
        self._wake()
        return admin_pb2.SetScaleResponse(scale=self._targets.describe())

    def drain(self, request: admin_pb2.DrainRequest) -> admin_pb2.DrainResponse:
        """
        Raises:
            RefusedError: see ``Draining.request``.
        """
        self._draining.request(request)
        self._wake()
        return admin_pb2.DrainResponse(scale_version=self._targets.version)

    async def watch(self, launcher: str) -> AsyncGenerator[admin_pb2.Scale]:
        """The scale now, and again after every change; for ever."""
        name = launcher or "unnamed"
        launchers = self._targets.launchers
        launchers[name] += 1
        try:
            while True:
                scale = self._targets.describe()
                yield scale
                await self._targets.wait_beyond(scale.version)
        finally:
            launchers[name] -= 1
            launchers += Counter()  # those without a watch go

    def describe(self, status: admin_pb2.GetStatusResponse) -> None:
        """Fill in what the status says about the number of servers."""
        status.scale.CopyFrom(self._targets.describe())
        status.launchers.extend(sorted(self._targets.launchers))
        status.scale_policy = self._policy
