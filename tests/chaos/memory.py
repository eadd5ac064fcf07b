"""How much memory the processes of a mesh hold over time."""

from __future__ import annotations

import asyncio

import psutil

from expertmesh.cli.local_mesh import LocalMesh

SAMPLE_S = 5.0
WARM_SHARE = 0.2
"""Of the samples, the first ones, are the time in which caches and pools fill."""
GROWTH_MIB, GROWTH_SHARE = 24.0, 0.05
"""What a process may have more at its end than after that time: pools that were not used up to then."""


class MemoryWatch:
    """Resident memory of each process, in MiB, every ``SAMPLE_S``; a process that ends begins anew as another one."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self._samples: dict[str, list[float]] = {}

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            self._sample()
            await asyncio.sleep(SAMPLE_S)

    def _sample(self) -> None:
        for server in self._mesh.servers.values():
            pid = server.pid
            if pid is None:
                continue
            try:
                resident = psutil.Process(pid).memory_info().rss / 2**20
            except psutil.NoSuchProcess:  # it ended between the two lines
                continue
            self._samples.setdefault(f"{server.id} ({pid})", []).append(resident)

    def figures(self) -> dict[str, list[float]]:
        """Process → MiB when it was warm, at its most after that, and in the end."""
        return {name: [warm, most, last] for name, (warm, most, last) in self._told().items()}

    def growths(self) -> list[str]:
        """Processes that had grown in the end."""
        return [
            f"{name} grew from {warm:.0f} to {last:.0f} MiB"
            for name, (warm, _, last) in self._told().items()
            if last > warm + max(GROWTH_MIB, GROWTH_SHARE * warm)
        ]

    def _told(self) -> dict[str, tuple[float, float, float]]:
        told = {}
        for name, samples in self._samples.items():
            after = samples[int(WARM_SHARE * len(samples)) :]
            told[name] = (after[0], max(after), after[-1])
        return told
