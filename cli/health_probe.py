"""Asks a server's standard health service, blocking: for the launcher, which has no event loop."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.errors import UserError

_CERTIFICATE_PROBLEMS = ("Hostname Verification Check failed", "CERTIFICATE_VERIFY_FAILED")
"""As gRPC says it."""


class HealthProbe:
    """One connection to ``address``; a context manager. ``role``: of the server, as its certificate has it."""

    def __init__(self, address: str, tls: TlsConfig, role: str | None = None) -> None:
        self._address = address
        self._channel = _channel(address, tls, role)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    def is_serving(self, timeout_s: float = 1.0) -> bool:
        """Whether the server as a whole says SERVING now; a server that cannot be reached does not.

        Raises:
            UserError: its certificate is not to be believed, which no waiting mends.
        """
        try:
            answer = self._stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=timeout_s)
        except grpc.RpcError as error:
            details = error.details() or ""
            if problem := next((text for text in _CERTIFICATE_PROBLEMS if text in details), None):
                raise UserError(
                    f"the certificate of {self._address}",
                    f"is refused ({problem})",
                    "api.cert_file, or else tls.cert_file, has to name this host (`expertmesh certs --host`) and to be "
                    "signed by the authority of the same section's ca_file",
                ) from None
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()


def _channel(address: str, tls: TlsConfig, role: str | None) -> grpc.Channel:
    # Without retries of its own: the caller asks again anyway, and grpc's back-off would grow past its patience.
    options: tuple[tuple[str, int | str], ...] = (
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
        *rpc.role_options(tls, role),
    )
    credentials = rpc.channel_credentials(tls)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)
