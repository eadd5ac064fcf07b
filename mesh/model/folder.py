"""Opening the files of a checkpoint folder, which somebody else wrote: nothing outside it is ever read."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from expertmesh.mesh.errors import UserError

MAX_NAME = 1000


def open_inside(folder: Path, name: str) -> int:
    """A file descriptor for reading a regular file of the folder. ``name`` may come from a file of the folder.

    A symbolic link may lead to another file of the folder, or to the ``blobs`` beside its ``snapshots``, where
    Hugging Face's cache keeps the files.

    Raises:
        UserError: the name or its link leaves the folder, or it is a pipe, a device or a folder.
        OSError: it is not there or cannot be opened.
    """
    check_name(str(folder), name)
    path = folder / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in _roots(Path(os.path.realpath(folder)))):
        raise UserError(
            str(path),
            f"is a link to {real}, outside the checkpoint folder",
            "copy the file into the folder, or point model.path at the folder that holds it",
        )
    # Without O_NONBLOCK opening a pipe would wait for somebody to write to it.
    descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(str(path), "cannot be read (it is no regular file)", "use a complete Hugging Face checkpoint")
    return descriptor


def check_name(where: str, name: str) -> None:
    """Raises ``UserError`` with the key ``where`` unless a name stays inside the folder that it is relative to."""
    parts = PurePosixPath(name).parts
    is_odd = len(name) > MAX_NAME or not name.isprintable() or "\\" in name
    if not parts or is_odd or name.startswith("/") or ".." in parts:
        raise UserError(
            where,
            f"names the file {name!r:.200}, outside the checkpoint folder",
            "use files that lie beside each other",
        )


def _roots(folder: Path) -> tuple[Path, ...]:
    if folder.parent.name == "snapshots":
        return folder, folder.parent.parent / "blobs"
    return (folder,)
