"""How a gRPC call ends that is not answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

_TIMEOUT_S = 60.0


async def refusal(awaited: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await awaited
    return refused.value


async def code_of(awaited: Awaitable[object]) -> grpc.StatusCode:
    try:
        await awaited
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def until_code(attempt: Callable[[], Awaitable[object]], wanted: grpc.StatusCode) -> None:
    """Tried until it ends so: a file of keys is read again within a moment."""
    async with asyncio.timeout(_TIMEOUT_S):
        while await code_of(attempt()) is not wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
