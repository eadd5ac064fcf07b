"""A client's API key: from the environment or a file, never from a flag, and with every call of a channel."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.gate import HEADER

VARIABLE = "EXPERTMESH_API_KEY"
FILE_VARIABLE = f"{VARIABLE}_FILE"


def key_from_environment() -> str | None:
    """EXPERTMESH_API_KEY, else what the file holds that EXPERTMESH_API_KEY_FILE names; None = neither is set.

    Raises:
        UserError: the file cannot be read, or the key can be none.
    """
    source, key = VARIABLE, os.environ.get(VARIABLE)
    if not key:
        name = os.environ.get(FILE_VARIABLE)
        if not name:
            return None
        source = FILE_VARIABLE
        try:
            key = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(source, f"{name} cannot be read ({error})", "name the file that holds the key") from None
    key = key.strip()
    if not (key.isascii() and key.isprintable() and key):
        raise UserError(source, "holds no API key", "give what `expertmesh keys create` printed")
    return key


def key_metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """The header of a call; none without a key."""
    return ((HEADER, f"Bearer {key}"),) if key is not None else ()


def key_interceptors(key: str | None) -> Sequence[grpc.aio.ClientInterceptor]:
    """For ``open_channel``: every call with one request carries the key."""
    return (_Unary(key), _Stream(key)) if key is not None else ()


class _WithKey:
    def __init__(self, key: str) -> None:
        self._metadata = key_metadata(key)

    def _with_key(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *self._metadata)
        return grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )


class _Unary(_WithKey, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._with_key(client_call_details), request)


class _Stream(_WithKey, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._with_key(client_call_details), request)
