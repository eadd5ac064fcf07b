"""One more router beside that of a local mesh, as a cluster has several of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import yaml

from expertmesh.cli.health_probe import HealthProbe
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh.config import TlsConfig
from support.mesh_state import until

READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SecondRouter:
    """A process that nobody starts again, and where it listens."""

    process: asyncio.subprocess.Process
    address: str


@asynccontextmanager
async def second_router(mesh: LocalMesh, server_id: str) -> AsyncIterator[SecondRouter]:
    """A router that can serve; killed in the end if it still runs."""
    config = yaml.safe_load((mesh.state_dir / "mesh.yaml").read_text(encoding="utf-8"))
    config["router"]["port"] = config["router"]["http"]["port"] = 0
    config_file = mesh.state_dir / f"{server_id}.yaml"
    config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = ("serve", "router", "--id", server_id, "--config", str(config_file))
    with (mesh.state_dir / f"{server_id}.log").open("a", encoding="utf-8") as log_file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=log_file,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), READY_TIMEOUT_S)
            router = SecondRouter(process=process, address=json.loads(line)["address"])
            await _until_serving(router.address)
            yield router
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _until_serving(address: str) -> None:
    with HealthProbe(address, TlsConfig()) as probe:

        async def is_serving() -> bool:
            return await asyncio.to_thread(probe.is_serving)

        await until(is_serving, READY_TIMEOUT_S, lambda: f"the router at {address} cannot serve")
