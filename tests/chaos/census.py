"""What the processes of a mesh hold of the machine, so that what they leave behind is found."""

from __future__ import annotations

from pathlib import Path

import psutil

from expertmesh.cli.local_mesh import LocalMesh

SHARED_MEMORY = Path("/dev/shm")


class Census:
    """Looks at a mesh from its start on; ``look`` as often as its processes change, ``leaks`` at the end."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self._seen: set[psutil.Process] = set()
        self._shared: set[str] = set()
        self._ports_at_first = self._ports()
        self.look()

    def look(self) -> None:
        """Remember every process of the mesh and each piece of shared memory that one has mapped."""
        for server in self._services().values():
            try:
                for process in (server, *server.children(recursive=True)):
                    self._seen.add(process)
                    self._shared |= _mapped(process)
            except psutil.NoSuchProcess:  # killed between the two lines
                continue

    def leaks_running(self) -> list[str]:
        """What a mesh that is whole again has beside its services and the ports that they had at first."""
        self.look()
        services = set(self._services().values())
        helpers = {child for service in services for child in service.children(recursive=True)}
        found = [
            f"{_told(process)} outlived its service" for process in self._seen - services - helpers if _runs(process)
        ]
        ports = self._ports()
        for server_id, count in self._ports_at_first.items():
            if server_id in ports and ports[server_id] > count:
                found.append(f"{server_id} listens on {ports[server_id]} ports, not on {count} as at first")
        return found

    def leaks_stopped(self) -> list[str]:
        """What is left of a mesh that was stopped."""
        found = [f"{_told(process)} outlived the mesh" for process in self._seen if _runs(process)]
        found += [f"shared memory {name} was left" for name in self._shared if (SHARED_MEMORY / name).exists()]
        return found

    def _services(self) -> dict[str, psutil.Process]:
        services = {}
        for server in self._mesh.servers.values():
            if server.pid is not None and psutil.pid_exists(server.pid):
                services[server.id] = psutil.Process(server.pid)
        return services

    def _ports(self) -> dict[str, int]:
        """Server id → ports that it listens on."""
        return {server_id: len(_listening(process)) for server_id, process in self._services().items()}


def _listening(process: psutil.Process) -> set[int]:
    try:
        return {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except psutil.NoSuchProcess:
        return set()


def _mapped(process: psutil.Process) -> set[str]:
    prefix = f"{SHARED_MEMORY}/"
    maps = Path(f"/proc/{process.pid}/maps")
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it has ended
        return set()
    return {line.partition(prefix)[2].removesuffix(" (deleted)") for line in lines if prefix in line}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _told(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({' '.join(process.cmdline())})"
    except psutil.NoSuchProcess:
        return f"process {process.pid}"
