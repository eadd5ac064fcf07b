"""Who may scrape /metrics: as the balancer's admin API, whoever may read."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from typing import Any

import grpc

from expertmesh.mesh.config_security import ApiConfig, TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.gate import Denied, Gate
from expertmesh.mesh.http_tls import server_context

_STATUS_OF = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}


class MetricsDoor:
    """Called by the threads of an endpoint, several at a time; ``close`` it at the end.

    Raises:
        UserError: a file of the certificates or the keys cannot be used.
    """

    def __init__(self, tls: TlsConfig, api: ApiConfig, server_id: str) -> None:
        try:
            self.context: ssl.SSLContext | None = server_context(tls, asks_for_keys=api.keys_file is not None)
        except OSError as error:
            raise UserError(
                "tls", f"{tls.cert_file} and its key cannot be used for /metrics ({error})", "mend the files"
            ) from None
        self._gate = Gate(tls, api, server_id)
        self._lock = threading.Lock()

    def why_not(self, authorization: str | None, certificate: Mapping[str, Any] | None, peer: str) -> tuple[int, str]:
        """HTTP's status of the refusal and its text; 200 and '' for who may read."""
        try:
            with self._lock:
                self._gate.refresh()
                self._gate.admit_header(
                    authorization, "read", peer=peer, action="GET /metrics", certificate=certificate
                )
        except Denied as denied:
            return _STATUS_OF[denied.code], denied.message
        return 200, ""

    def close(self) -> None:
        self._gate.close()


def metrics_door(tls: TlsConfig, api: ApiConfig, server_id: str) -> MetricsDoor | None:
    """As these say; None = anybody may scrape, in the clear.

    Raises:
        UserError: as ``MetricsDoor``.
    """
    if tls.cert_file is None and api.keys_file is None:
        return None
    return MetricsDoor(tls, api, server_id)
