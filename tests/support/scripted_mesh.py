"""A mesh of real processes under a balancer that a test plays."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import yaml

from expertmesh.cli.process import ProcessEvent, ServiceProcess
from expertmesh.mesh.config import MeshConfig
from support.scripted_balancer import Place, ScriptedBalancer, linear


class ScriptedMesh:
    """Real router and rank processes under a ``ScriptedBalancer``. An async context manager."""

    def __init__(self, folder: Path, config: MeshConfig, place: Place = linear) -> None:
        self._folder = folder
        self._config = config
        counts = {"attention": config.attention.servers, "both": config.both_servers, "expert": config.expert.servers}
        self._ids = [(role, f"{role}-{i}") for role, count in counts.items() for i in range(count)]
        self.balancer = ScriptedBalancer(len(self._ids), place)
        self.servers: dict[str, ServiceProcess] = {}

    @property
    def state_dir(self) -> Path:
        """Where the logs are."""
        return self._folder

    @property
    def router(self) -> str:
        address = self.servers["router-0"].address
        assert address is not None
        return address

    def pid(self, server_id: str) -> int:
        pid = self.servers[server_id].pid
        assert pid is not None
        return pid

    async def __aenter__(self) -> ScriptedMesh:
        await self.balancer.start()
        section = self._config.balancer.model_copy(update={"address": self.balancer.address})
        config = self._config.model_copy(update={"balancer": section})
        file = self._folder / "mesh.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        loop, ready = asyncio.get_running_loop(), asyncio.Semaphore(0)

        def on_event(event: ProcessEvent) -> None:
            if event.kind == "ready":
                loop.call_soon_threadsafe(ready.release)

        for role, server_id in [*self._ids, ("router", "router-0")]:
            log_file = self._folder / f"{server_id}.log"
            log_file.touch()
            command = [sys.executable, "-P", "-m", "expertmesh.cli.main", "serve", role, "--id", server_id]
            command += ["--config", str(file), "--stop-with-stdin"]
            server = ServiceProcess(
                role=role,
                server_id=server_id,
                command=lambda command=command: command,  # type: ignore[misc]  # mypy cannot infer the default
                environment={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
                log_file=log_file,
                on_event=on_event,
                restart=False,
            )
            self.servers[server_id] = server
            server.start()
        try:
            async with asyncio.timeout(60):
                for _ in self.servers:
                    await ready.acquire()
            await self.balancer.wait_serving()
        except BaseException:
            await self.__aexit__()
            print(self.logs())
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        for server in self.servers.values():
            server.begin_stop()
        for server in self.servers.values():
            await asyncio.to_thread(server.finish_stop, 5.0)
        await self.balancer.stop()

    def logs(self, lines: int = 40) -> str:
        parts = []
        for path in sorted(self._folder.glob("*.log")):
            parts += [f"--- {path.name}", *path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)
