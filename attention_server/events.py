"""What an engine is told of its sequences: that one comes, or that some are over."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from expertmesh.attention_server.request import Sequence


@dataclass(frozen=True, slots=True)
class Abort:
    """The router no longer wants a sequence."""

    link: int
    handle: int


@dataclass(frozen=True, slots=True)
class Unlink:
    """A link is gone, and with it the reader of all its sequences."""

    link: int


@dataclass(frozen=True, slots=True)
class EndAll:
    """Every sequence ends with a status."""

    code: grpc.StatusCode
    message: str


Event = Sequence | Abort | Unlink | EndAll
