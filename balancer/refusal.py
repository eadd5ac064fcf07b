"""How the balancer says no to an administrator."""

from __future__ import annotations

import grpc


class RefusedError(Exception):
    """What an administrator asked for cannot be done, or cannot go on; nothing has changed."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
