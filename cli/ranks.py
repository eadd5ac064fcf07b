"""``expertmesh ranks``: several ranks of one machine under one supervisor, which the scheduler sees as one process.

Data planes between GPUs need to see all GPUs of the node in every rank, so the ranks of a node share a container.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from expertmesh.cli.local_plan import environment
from expertmesh.cli.next_ports import with_next_ports
from expertmesh.cli.process import ProcessEvent, ServiceProcess
from expertmesh.cli.signals import SignalWatch
from expertmesh.cli.slurm import RankRole
from expertmesh.mesh.config import MeshConfig, load_config

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0


def ranks(
    role: Annotated[RankRole, typer.Argument(help="What all of them are.")],
    count: Annotated[int, typer.Option(min=1, help="So many; each takes the GPU of its number.")],
    server_id: Annotated[str, typer.Option("--id", help="The first one is ID-0 in the mesh.")],
    config_file: Annotated[Path | None, typer.Option("--config", help="mesh.yaml; unset = every default.")] = None,
    node: Annotated[str | None, typer.Option(help="Ranks of one node share fast links; overrides node.")] = None,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Of this machine, as others reach it.")] = None,
) -> None:
    """Run COUNT ranks until SIGTERM; one that dies is started again, the others go on.

    Ports that are set are those of the first; each further rank takes the next ones. Ends with 0 when all have left or
    were stopped, with the status of a rank that was given up otherwise.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(config_file)
    options = [*(["--node", node] if node else []), *(["--host", host] if host else [])]
    with tempfile.TemporaryDirectory(prefix="expertmesh-ranks-") as folder:
        group = RankGroup(config, role.value, count, server_id, options, Path(folder))
        raise typer.Exit(group.run())


class RankGroup:
    """The ranks of one machine; ``folder`` takes their configurations."""

    def __init__(
        self, config: MeshConfig, role: str, count: int, server_id: str, options: Sequence[str], folder: Path
    ) -> None:
        self._exit_code = 0
        self._left = count
        self._changed = threading.Condition()
        self._stopping = False
        self._servers = [
            self._service(with_next_ports(config, index), role, f"{server_id}-{index}", index, options, folder)
            for index in range(count)
        ]

    def run(self) -> int:
        """Until all have left, one is given up, or a signal comes; the exit status."""
        with SignalWatch(self._on_signal):
            for server in self._servers:
                server.start()
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._left == 0)
            for server in self._servers:
                server.begin_stop()
            deadline_s = time.monotonic() + STOP_TIMEOUT_S
            for server in self._servers:
                server.finish_stop(max(0.1, deadline_s - time.monotonic()))
        return self._exit_code

    def _service(
        self, config: MeshConfig, role: str, server_id: str, index: int, options: Sequence[str], folder: Path
    ) -> ServiceProcess:
        file = folder / f"mesh-{index}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        serve = ["serve", role, "--id", server_id, "--config", str(file), "--gpu", str(index), "--stop-with-stdin"]
        return ServiceProcess(
            role=role,
            server_id=server_id,
            command=lambda: [sys.executable, "-P", "-m", "expertmesh.cli.main", *serve, *options],
            environment=environment(config, role),
            log_file=None,
            on_event=self._on_event,
        )

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("%s: all ranks stop", number.name)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _on_event(self, event: ProcessEvent) -> None:
        log.info("%s: %s", event.server_id, event.text)
        with self._changed:
            if event.kind == "ready":
                next(server for server in self._servers if server.id == event.server_id).established = True
            elif event.kind == "left":
                self._left -= 1
            elif event.kind == "failed":  # the scheduler starts all of them again, elsewhere if it likes
                self._exit_code, self._stopping = max(event.exit_code, 1), True
            self._changed.notify_all()
