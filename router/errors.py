"""How a router says no: every refusal carries the gRPC status that fits it and a message that says what to change."""

from __future__ import annotations

import grpc


class Refusal(Exception):
    """The request ends with ``code`` and ``message``.

    Args:
        code: the gRPC status, never OK or UNKNOWN.
        message: names the field, its value and the remedy.
        retry_after_ms: when trying again makes sense; sent as trailing metadata ``retry-after-ms``.
        field: of the request, as its message type names it; ``message`` begins with it. '' = it is none's fault.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, retry_after_ms: int | None = None, field: str = ""
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.field = field

    def anew(self) -> Refusal:
        """The same, to be raised where this one is kept: an error that is raised keeps those who keep it."""
        return Refusal(self.code, self.message, retry_after_ms=self.retry_after_ms, field=self.field)


def invalid(field: str, problem: str, remedy: str) -> Refusal:
    """An INVALID_ARGUMENT that names the field, what is wrong with its value, and what to send instead."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}; {remedy}", field=field)
