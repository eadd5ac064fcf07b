"""The folder of one running mesh, locked while it runs, and the file that tells other commands its addresses."""

from __future__ import annotations

import fcntl
import json
import logging
import tempfile
from pathlib import Path
from typing import IO

from expertmesh.mesh.errors import UserError

log = logging.getLogger(__name__)


class StateDir:
    """A folder that this process holds until ``release``, or until it dies."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> StateDir:
        """Make ``path`` if it is missing, and lock it.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)  # logs and state are nobody else's business
            lock = (path / "lock").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(str(path), f"cannot be written ({error.strerror})", "run in another folder") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(str(path), "another mesh runs in it", "stop that one, or choose another name") from None
        return cls(path.resolve(), lock)

    @classmethod
    def claim_free(cls, parent: Path, name: str) -> StateDir:
        """``parent/name``, or ``parent/name-2``, ``-3`` ... when running meshes hold those."""
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            if not is_held(path):
                return cls.claim(path)
            number += 1

    def release(self) -> None:
        self._lock.close()


def is_held(path: Path) -> bool:
    """Whether a running mesh has claimed ``path``."""
    try:
        with (path / "lock").open("r", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to look at: whoever claims it learns why
        return False
    return False


class RunFile:
    """``.expertmesh/run.json``: at most one running mesh owns it; the file of a mesh that died is taken over."""

    def __init__(self, path: Path, state_dir: Path) -> None:
        self._path = path
        self._state_dir = state_dir

    def write(self, router: str, balancer: str, http: str | None = None) -> None:
        """Write the addresses, unless the file belongs to another mesh that runs."""
        owner = self._owner()
        if owner is not None and owner != self._state_dir and is_held(owner):
            log.warning("%s belongs to the mesh in %s: reach this one with --router %s", self._path, owner, router)
            return
        addresses = {"router": router, "balancer": balancer, "state_dir": str(self._state_dir)}
        if http is not None:
            addresses["http"] = http
        write_atomically(self._path, json.dumps(addresses, indent=1) + "\n")

    def remove(self) -> None:
        """Remove the file if it is this mesh's."""
        if self._owner() == self._state_dir:
            self._path.unlink()

    def _owner(self) -> Path | None:
        try:
            return Path(json.loads(self._path.read_text(encoding="utf-8"))["state_dir"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)
