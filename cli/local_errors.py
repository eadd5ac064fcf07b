"""How waiting for a local mesh ends when it does not serve."""

from __future__ import annotations

import signal


class MeshFailedError(RuntimeError):
    """A service gave up, or the mesh was not ready in time; ``exit_code`` is 2 when the user can mend it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MeshInterruptedError(RuntimeError):
    """``LocalMesh.interrupt`` was called while somebody waited for the mesh."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
