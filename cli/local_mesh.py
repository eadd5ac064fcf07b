"""A whole mesh as supervised processes on this machine: what ``expertmesh up`` and the tests start."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from expertmesh.cli.connection import admin_tls, door_tls
from expertmesh.cli.health_probe import HealthProbe
from expertmesh.cli.local_config import LocalConfig
from expertmesh.cli.local_errors import MeshFailedError, MeshInterruptedError
from expertmesh.cli.local_plan import (
    GpuNumbers,
    check_ports,
    environment,
    has_past,
    with_balancer_state,
)
from expertmesh.cli.local_roster import SCALED_ROLES, Roster
from expertmesh.cli.process import USER_ERROR_STATUS, ProcessEvent, ServiceProcess
from expertmesh.cli.scale_watch import ScaleWatch
from expertmesh.cli.shared_door import SharedDoor
from expertmesh.cli.state_dir import RunFile, StateDir
from expertmesh.mesh.access import OPERATOR
from expertmesh.mesh.client_key import key_from_environment
from expertmesh.mesh.config import MeshConfig

log = logging.getLogger(__name__)

BALANCER_READY_TIMEOUT_S = 30.0
HEALTH_POLL_S = 0.05
STOP_TIMEOUT_S = 8.0
"""For one group of services; twice SIGTERM's usual need, then SIGKILL."""

LAUNCHER = "expertmesh up"
"""As `expertmesh balancer status` shows who starts servers when the scale asks for them."""


class LocalMesh:
    """Balancer, routers and ranks of one configuration, on loopback, each a process under supervision.

    Blocking and thread-safe: ``start`` returns when every process has been started, ``wait_ready`` when the router can
    serve; ``stop`` ends all. A context manager does the three.

    Args:
        config: its counts of servers decide what is started; ports of 0 are picked by the services.
        state_dir: for the effective mesh.yaml, logs and the balancer's state; released by ``stop``.
        run_file: tells other commands the addresses while the mesh is ready.
        restart: start services again when they die.

    Raises:
        UserError: a setting cannot be used on one machine.
    """

    def __init__(
        self,
        config: MeshConfig,
        state_dir: StateDir,
        *,
        run_file: RunFile | None = None,
        restart: bool = True,
        on_event: Callable[[ProcessEvent], None] = lambda event: None,
    ) -> None:
        check_ports(config)
        self._claim = state_dir
        self.state_dir = state_dir.path
        self._config = LocalConfig(with_balancer_state(config, self.state_dir), self.state_dir)
        self._run_file = run_file
        self._restart = restart
        self._on_event = on_event
        self._changed = threading.Condition()
        self._failure: MeshFailedError | MeshInterruptedError | None = None
        self._ready: set[str] = set()
        self._given_up: set[str] = set()  # of those that were added to a whole mesh
        self._watch: ScaleWatch | None = None
        self._door: SharedDoor | None = None
        self._gpus = GpuNumbers()
        self._roster = Roster(self._config.current, self._service, self._changed, is_planned=not has_past(config))

    @property
    def config(self) -> MeshConfig:
        """As the services see it: with the balancer's address once that is known."""
        return self._config.current

    @property
    def servers(self) -> dict[str, ServiceProcess]:
        """By id: ``balancer``, ``router-0`` ..., ``attention-0`` ..., ``expert-0`` ..., ``both-0`` ..."""
        return dict(self._roster.servers)

    @property
    def router(self) -> str:
        """``host:port``, once ready; where there are several routers, they all listen there."""
        return _known_address(self._roster.servers["router-0"])

    @property
    def http(self) -> str | None:
        """``host:port`` of the router's HTTP door, once ready; None = it is off."""
        return self._roster.servers["router-0"].http_address

    @property
    def balancer(self) -> str:
        """``host:port``, once started; several have commas between them."""
        return ",".join(_known_address(server) for server in self._balancer_processes())

    def start(self) -> None:
        """Start the balancers, wait for their addresses, start all others at once.

        Raises:
            MeshFailedError: a balancer does not start.
            UserError: the routers' ports are taken.
        """
        if self.config.router.servers > 1:
            self._door = SharedDoor(self.config.router)
            self._config.set_router(self._door.address, self._door.http_address)
        self._config.write()
        balancers = self._balancer_processes()
        for balancer in balancers:
            balancer.start()
        started = {balancer.id for balancer in balancers}
        self._wait_for(lambda: started <= self._ready, BALANCER_READY_TIMEOUT_S, "the balancer to start")
        self._watch = ScaleWatch(
            lambda: self.balancer, admin_tls(self.config), LAUNCHER, self._roster.see_to, key_from_environment()
        )
        self._watch.start()
        self._wait_for(
            lambda: self._roster.is_planned, BALANCER_READY_TIMEOUT_S, "the balancer to say how many servers start"
        )
        for server_id in self._roster.planned - started:
            self._roster.servers[server_id].start()

    def _balancer_processes(self) -> list[ServiceProcess]:
        return [server for server in self._roster.servers.values() if server.role == "balancer"]

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Until every process is up and the router's health is SERVING: that of one of several, as the kernel chooses;
        on one that has no attention server yet requests wait.

        Raises:
            MeshFailedError: a service gave up, or it took longer than ``timeout_s``.
        """
        deadline_s = time.monotonic() + timeout_s
        self._wait_for(lambda: self._roster.planned <= self._ready, timeout_s, "every service to start")
        with HealthProbe(self.router, door_tls(self.config, OPERATOR), "router") as probe:
            while not probe.is_serving():
                if time.monotonic() > deadline_s:
                    raise MeshFailedError(
                        f"the router cannot serve after {timeout_s:.0f} s: see {self.state_dir}/*.log"
                    )
                with self._changed:
                    self._changed.wait(HEALTH_POLL_S)
                self.raise_failure()
        for server in self._roster.servers.values():
            server.established = True
        if self._run_file is not None:
            self._run_file.write(self.router, self.balancer, self.http)

    def wait_failed(self, timeout_s: float | None = None) -> None:
        """Wait until a service gives up, or for ``timeout_s``.

        Raises:
            MeshFailedError: a service gave up.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, timeout_s)
        self.raise_failure()

    def interrupt(self, number: signal.Signals) -> bool:
        """End every wait with ``MeshInterruptedError``; False when the mesh had been interrupted before."""
        with self._changed:
            if isinstance(self._failure, MeshInterruptedError):
                return False
            self._failure = MeshInterruptedError(number)
            self._changed.notify_all()
        return True

    def raise_failure(self) -> None:
        """
        Raises:
            MeshFailedError: a service gave up.
            MeshInterruptedError: ``interrupt`` was called.
        """
        if self._failure is not None:
            raise self._failure

    def kill(self, server_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one service; supervision starts it again unless it ends with 0."""
        self._roster.servers[server_id].kill(number)

    def add(self, role: str, timeout_s: float = 60.0) -> str:
        """Start one more ``attention``, ``expert`` or ``both`` server, which joins the running mesh.

        Returns:
            Its id, one that this mesh never had, once its process is ready. The balancer takes it into a view then.

        Raises:
            MeshFailedError: it gave up, or was not ready in time.
        """
        assert role in SCALED_ROLES, f"a {role} cannot be added to a running mesh"
        server = self._roster.one_more(role)
        server.start()
        self._wait_for(lambda: server.id in self._ready | self._given_up, timeout_s, f"{server.id} to start")
        if server.id in self._given_up:
            raise MeshFailedError(f"{server.id} cannot start; see {server.log_file}")
        return server.id

    def forget(self, server_id: str) -> None:
        """Supervise a server no longer that has left for good: it was drained, and its process has ended."""
        server = self._roster.drop(server_id)
        with self._changed:
            self._ready.discard(server_id)
        server.stop_restarting()

    def kill_all(self) -> None:
        """SIGKILL every service, for good. ``stop`` still has to be called, and has nothing to wait for."""
        for server in self.servers.values():
            server.stop_restarting()
            server.kill(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM the routers, then the ranks together, then the balancers; SIGKILL what does not end in time."""
        if self._watch is not None:
            self._watch.stop()  # from here on nothing is started
        servers = self.servers.values()
        for server in servers:
            server.stop_restarting()
        for roles in (("router",), SCALED_ROLES, ("balancer",)):
            group = [server for server in servers if server.role in roles]
            deadline_s = time.monotonic() + STOP_TIMEOUT_S
            for server in group:
                server.begin_stop()
            for server in group:
                server.finish_stop(max(0.1, deadline_s - time.monotonic()))
        if self._door is not None:
            self._door.close()
        if self._run_file is not None:
            self._run_file.remove()
        self._claim.release()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _service(self, role: str, server_id: str) -> ServiceProcess:
        log_file = self.state_dir / f"{server_id}.log"
        log_file.write_bytes(b"")
        return ServiceProcess(
            role=role,
            server_id=server_id,
            command=lambda: self._command(role, server_id),
            environment=environment(self.config, role),
            log_file=log_file,
            on_event=self._on_process_event,
            restart=self._restart,
        )

    def _command(self, role: str, server_id: str) -> Sequence[str]:
        serve = ["serve", role, "--id", server_id, "--config", str(self._config.file), "--stop-with-stdin"]
        if (port := self._config.balancer_port(server_id)) is not None:
            serve += ["--port", str(port)]
        if role == "router" and self._door is not None:
            serve += ["--share-port"]
        if role in SCALED_ROLES:
            serve += ["--gpu", str(self._gpus.of(server_id, self._roster.servers))]
        return [sys.executable, "-P", "-m", "expertmesh.cli.main", *serve]

    def _on_process_event(self, event: ProcessEvent) -> None:
        log.info("%s: %s", event.server_id, event.text)
        with self._changed:
            if event.kind == "ready":
                self._ready.add(event.server_id)
                self._roster.servers[event.server_id].established |= self._is_extra(event.server_id)
                self._config.learn(self._roster.servers[event.server_id])
            if event.kind == "failed" and self._is_extra(event.server_id):
                log.error("%s cannot start; the mesh goes on without it", event.server_id)
                self._given_up.add(event.server_id)
            elif event.kind == "failed" and self._failure is None:
                self._failure = MeshFailedError(
                    f"{event.server_id}: {event.text}" if event.exit_code != USER_ERROR_STATUS else event.text,
                    USER_ERROR_STATUS if event.exit_code == USER_ERROR_STATUS else 1,
                )
            self._changed.notify_all()
        self._on_event(event)

    def _is_extra(self, server_id: str) -> bool:
        """Whether the mesh was whole before it was started."""
        return server_id not in self._roster.planned

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or condition(), timeout_s)
        self.raise_failure()
        if not condition():
            missing = ", ".join(sorted(set(self.servers) - self._ready))
            raise MeshFailedError(
                f"waited {timeout_s:.0f} s for {what}; not ready: {missing}; see {self.state_dir}/*.log"
            )


def _known_address(server: ServiceProcess) -> str:
    assert server.address is not None, f"{server.id} has no address yet"
    return server.address
