"""Refusals as HTTP has them: a status, and the error object that OpenAI's clients know."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import grpc
from pydantic import ValidationError

from expertmesh.mesh.gate import Denied
from expertmesh.router.errors import Refusal, invalid

CLIENT_GONE = 499
"""nginx's number for a client that did not wait for its answer: nobody reads it, metrics show it."""

_STATUS_OF = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNIMPLEMENTED: 400,  # 5xx would make clients try again
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: CLIENT_GONE,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPE_OF = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODE_OF = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
_OUR_NAMES = {
    "text": "prompt",
    "tokenized": "prompt",
    "tokenized.input_ids": "prompt",
    "input": "prompt",
    "chat": "messages",
    "tenant": "user",
    "chat.template_kwargs": "chat_template_kwargs",
}
_SAMPLING = "sampling_params."


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpError:
    """An answer that says no."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_ms: int | None = None

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        if self.retry_after_ms is None:
            return {}
        return {"retry-after": str(math.ceil(self.retry_after_ms / 1000)), "retry-after-ms": str(self.retry_after_ms)}


def plain_error(status: int, message: str) -> HttpError:
    """One that no generation refused: an unknown path, a body that is too large."""
    kind = _TYPE_OF.get(status, "invalid_request_error" if status < 500 else "server_error")
    return HttpError(status=status, message=message, type=kind)


def http_error(refusal: Refusal | Denied, *, max_tokens_name: str = "max_tokens") -> HttpError:
    """With the field's name in OpenAI's API.

    Args:
        max_tokens_name: what the caller called its limit of tokens.
    """
    status = _STATUS_OF.get(refusal.code, 500)
    field = refusal.field if isinstance(refusal, Refusal) else ""
    message, param = refusal.message, None
    if field:
        param = _param(field, max_tokens_name)
        message = param + message.removeprefix(field)
    return HttpError(
        status=status,
        message=message.replace(_SAMPLING + "max_tokens", max_tokens_name).replace(_SAMPLING, ""),
        type=_TYPE_OF.get(status, "server_error"),
        param=param,
        code=_CODE_OF.get(status),
        retry_after_ms=refusal.retry_after_ms,
    )


def refusal_of(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body, by its name."""
    first = error.errors(include_url=False, include_context=False)[0]
    # The names of a union's alternatives stand in the path too; they are types and no fields.
    path = [part for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_]+", part)]
    names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part not in ("str", "list")]
    field = "".join(names).removeprefix(".") or "body"
    if first["type"] == "extra_forbidden":
        return invalid(field, "is no parameter of this API", "leave it out")
    if first["type"] == "json_invalid":
        return invalid("body", first["msg"], "send a JSON object")
    if first["type"] == "missing":
        return invalid(field, "is missing", "send it")
    return invalid(
        field, f"{first['msg']}, and it is {_shown(first['input'])}", "send what it may be (docs/http-api.md)"
    )


def _param(field: str, max_tokens_name: str) -> str:
    if field == _SAMPLING + "max_tokens":
        return max_tokens_name
    return _OUR_NAMES.get(field) or field.removeprefix(_SAMPLING).removeprefix("chat.")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
