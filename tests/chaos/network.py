"""A mesh in two halves, each in a network namespace of its own, with a bridge between them that can be taken away.

The process that plays has a namespace of its own as well (``play_apart`` starts it): it belongs to the near half.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chaos.outcome import Outcome, Targets
from chaos.stage import Stage, Trial
from chaos.traffic import Traffic
from expertmesh.cli.local_config import LocalConfig
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir, write_atomically
from expertmesh.mesh.config import MeshConfig
from support import mesh_state
from support.mesh import mesh_config, started

FAR = ("attention-1", "expert-2")
"""The others, the router and the balancer are near, and have room for all experts."""
NEAR_HOST, FAR_HOST = "10.77.0.1", "10.77.0.2"
APART = "EXPERTMESH_CHAOS_APART"
CUT_S = 5.0
TIMEOUT_S = 300.0


def why_not() -> str | None:
    """Why two halves cannot be had on this machine; None when they can."""
    for command in ("unshare", "nsenter", "ip"):
        if shutil.which(command) is None:
            return f"there is no command {command!r}"
    script = "ip link set lo up && ip link add name bridge type bridge && ip link add name port type veth"
    done = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"network namespaces are not permitted ({done.stderr.strip()})"


async def play_apart(name: str, *, seed: int, long: bool) -> Outcome:
    """Play a scenario of this module in a process with a network of its own."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-chaos-") as folder:
        report = Path(folder) / "report.json"
        options = ["--only", name, "--seed", str(seed), "--json", str(report), *([] if long else ["--short"])]
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--net", sys.executable, "-P", "-m", "chaos", *options),
            env={**os.environ, APART: "1"},
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            await asyncio.wait_for(process.wait(), TIMEOUT_S)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        fields: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["scenarios"][0]
    for key in ("failures", "command", "date"):
        del fields[key]
    return Outcome(**{**fields, "targets": Targets(**fields["targets"])})


@dataclass(frozen=True)
class Halves:
    """Two namespaces, this process's and a named one, and the bridge between them."""

    far: str

    def cut(self) -> None:
        """From now on packets vanish without a word, as when a switch dies."""
        _ip("link", "set", "port", "nomaster")

    def mend(self) -> None:
        _ip("link", "set", "port", "master", "bridge")


@contextlib.contextmanager
def halves() -> Iterator[Halves]:
    """In a namespace of its own that has nothing yet."""
    far = f"expertmesh-chaos-{os.getpid()}"
    _ip("netns", "add", far)
    try:
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "name", "bridge", "type", "bridge")
        _ip("addr", "add", f"{NEAR_HOST}/24", "dev", "bridge")
        _ip("link", "add", "name", "port", "type", "veth", "peer", "name", "far", "netns", far)
        _ip("link", "set", "port", "master", "bridge", "up")
        _ip("link", "set", "bridge", "up")
        for words in (("link", "set", "lo", "up"), ("addr", "add", f"{FAR_HOST}/24", "dev", "far")):
            _ip("-n", far, *words)
        _ip("-n", far, "link", "set", "far", "up")
        yield Halves(far)
    finally:
        _ip("netns", "del", far)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"


class SplitConfig(LocalConfig):
    """Is written for each half."""

    @property
    def far(self) -> Path:
        return self.file.with_name("mesh-far.yaml")

    def write(self) -> None:
        super().write()
        data = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        data["dataplane"]["interface_host"] = data["telemetry"]["metrics_host"] = FAR_HOST
        write_atomically(self.far, yaml.safe_dump(data, sort_keys=False))


class SplitMesh(LocalMesh):
    """``FAR`` servers run in the far namespace, with addresses there."""

    def __init__(self, config: MeshConfig, state_dir: StateDir, between: Halves) -> None:
        self.between = between
        super().__init__(config, state_dir)
        self._config = self._split = SplitConfig(self.config, self.state_dir)

    def _command(self, role: str, server_id: str) -> Sequence[str]:
        command = [str(word) for word in super()._command(role, server_id)]
        if server_id not in FAR:
            return command
        far = [str(self._split.far) if word == str(self._split.file) else word for word in command]
        return ["nsenter", f"--net=/run/netns/{self.between.far}", *far]


@dataclass
class SplitStage(Stage):
    """Starts meshes in two halves."""

    between: Halves | None = None

    def start(self, folder: Path, config: dict[str, Any]) -> LocalMesh:
        assert self.between is not None, "a split stage has two halves"
        hosts = ("router__host", "balancer__host", "dataplane__interface_host", "telemetry__metrics_host")
        settings = mesh_config(**dict.fromkeys(hosts, NEAR_HOST), **config)
        return started(SplitMesh(settings, StateDir.claim(folder), self.between))


async def network_cut(trial: Trial, traffic: Traffic) -> None:
    """The halves lose each other for some seconds: the near one goes on, the far one makes nothing and comes back."""
    mesh, outcome = trial.mesh, trial.outcome
    assert isinstance(mesh, SplitMesh), "this scenario needs a mesh in two halves"
    before = await trial.incarnations()
    last_event = (await mesh_state.events(mesh))[-1].number
    mesh.between.cut()
    cut_unix_s = time.time()
    try:
        await asyncio.sleep(CUT_S)
    finally:
        mesh.between.mend()
    mended_s, mended_unix_s = time.monotonic(), time.time()
    await trial.until_whole(other_than={server_id: before[server_id] for server_id in FAR})
    outcome.recovery_s.append(time.monotonic() - mended_s)
    events = [event for event in await mesh_state.events(mesh) if event.number > last_event]
    during = [event for event in events if event.unix_s < mended_unix_s]
    members = {event.subject: event.message for event in during if event.kind == "view_published"}
    # Leases do not end at the same moment: a view may be published with one whose time is not up, but cannot form.
    served = [members[event.subject] for event in during if event.kind == "view_serving"]
    if not served:
        outcome.problems.append(f"the near half did not go on: {[event.kind for event in during]}")
    if any(server_id in message for message in served for server_id in FAR):
        outcome.problems.append(f"a view that served had a server that was cut off: {served}")
    entered = [line for server_id in FAR for line in _views_entered(mesh, server_id, cut_unix_s, mended_unix_s)]
    outcome.problems += [f"the far half entered a view of its own: {line}" for line in entered]


def _views_entered(mesh: LocalMesh, server_id: str, from_s: float, to_s: float) -> list[str]:
    """Lines of its log in that time which say that it steps in a view."""
    stamps = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)) for second in (from_s, to_s)]
    lines = (mesh.state_dir / f"{server_id}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if stamps[0] < line[:19] < stamps[1] and "in view" in line]
