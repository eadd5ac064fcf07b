"""Where scenarios play: one real mesh after another, and the faults that can be done to it."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.census import Census
from chaos.outcome import Outcome
from chaos.traffic import Question
from expertmesh.cli.local_mesh import LocalMesh
from support import mesh_state
from support.etcd import EtcdProcess
from support.mesh import logs, mesh_config, start_mesh

RECOVERY_TIMEOUT_S = 90.0
POLL_S = 0.05


@dataclass(kw_only=True)
class Trial:
    """One run of one scenario."""

    mesh: LocalMesh
    census: Census
    asked: Sequence[Question]
    outcome: Outcome
    random: random.Random
    long: bool
    etcd: EtcdProcess | None = None
    """That the mesh's balancers share, if they do."""
    minutes: float = 10.0
    """Of the long version of a scenario that goes on and on."""

    async def kill(self, victim: str) -> None:
        """kill -9 a rank and wait until every server steps in one view again, the victim under a new incarnation."""
        before = await self.incarnations()
        self.census.look()
        started_s = time.monotonic()
        self.mesh.kill(victim)
        await self.until_whole(other_than={victim: before[victim]})
        self.outcome.recovery_s.append(time.monotonic() - started_s)

    async def freeze(self, victim: str, seconds: float) -> None:
        """SIGSTOP, SIGCONT; recovery counts from SIGCONT."""
        before = await self.incarnations()
        self.mesh.kill(victim, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.mesh.kill(victim, signal.SIGCONT)
        started_s = time.monotonic()
        await self.until_whole(other_than={victim: before[victim]})
        self.outcome.recovery_s.append(time.monotonic() - started_s)

    async def incarnations(self) -> dict[str, str]:
        """Of every rank; the mesh has to be whole."""
        await self.until_whole()
        found = await mesh_state.stepping(self.mesh)
        assert found is not None, "a whole mesh broke by itself"
        return found

    async def until_whole(self, other_than: Mapping[str, str] | None = None) -> None:
        """Until every rank steps in one view, none of them under the incarnation given."""

        async def is_whole() -> bool:
            found = await mesh_state.stepping(self.mesh)
            return found is not None and not (found.items() & (other_than or {}).items())

        await mesh_state.until(
            is_whole, RECOVERY_TIMEOUT_S, lambda: f"the mesh is not whole\n{logs(self.mesh, 15)}", POLL_S
        )


@dataclass
class Stage:
    """Starts meshes on demand; scenarios of the same configuration play on the same mesh."""

    folder: Path
    _config: dict[str, Any] = field(default_factory=dict)
    _mesh: LocalMesh | None = None
    _census: Census | None = None
    _count: int = 0
    etcd: EtcdProcess | None = None

    async def set(self, config: dict[str, Any]) -> tuple[LocalMesh, Census]:
        """A mesh with ``mesh_config(**config)``; one of another configuration is stopped first."""
        if self._config != config:
            await self.clear()
        if self._mesh is None or self._census is None:
            self._count += 1
            overrides = {"telemetry__metrics_port": 0, **config}
            self._mesh = await asyncio.to_thread(self.start, self.folder / f"mesh-{self._count}", overrides)
            self._census, self._config = Census(self._mesh), config
        return self._mesh, self._census

    def start(self, folder: Path, config: dict[str, Any]) -> LocalMesh:
        """A mesh that serves, and starts again what dies; with an etcd if its balancers want one."""
        if config.get("balancer__state") == "etcd":
            etcd_folder = folder.with_name(f"{folder.name}-etcd")
            etcd_folder.mkdir(parents=True)
            self.etcd = EtcdProcess(etcd_folder)
            self.etcd.start()
            config = {**config, "balancer__etcd__endpoints": [self.etcd.endpoint]}
        return start_mesh(folder, mesh_config(**config), restart=True)

    async def clear(self) -> list[str]:
        """Stop the mesh. Returns what it left behind."""
        mesh, census = self._mesh, self._census
        self._mesh = self._census = None
        if mesh is None:
            return []
        await asyncio.to_thread(mesh.stop)
        if self.etcd is not None:
            self.etcd.stop()
            self.etcd = None
        return census.leaks_stopped() if census is not None else []
