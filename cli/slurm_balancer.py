"""The balancer as the processes of a Slurm job ask it: whichever leads, with the operator's certificate and key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from expertmesh.cli.connection import admin_tls
from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.client_key import key_from_environment, key_interceptors
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.leader import find_leader
from expertmesh.v1 import admin_pb2, admin_pb2_grpc

ASK_TIMEOUT_S = 2.0


class Balancer:
    """Of the mesh that ``config`` describes, which has its address."""

    def __init__(self, config: MeshConfig) -> None:
        assert config.balancer.address is not None, "the job wrote it into mesh.yaml"
        self.addresses = split_addresses(config.balancer.address)
        self._tls = admin_tls(config)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
        """A connection to the one that leads, or that is asked first where none does."""
        leader = await find_leader(self.addresses, self._tls, ASK_TIMEOUT_S) or self.addresses[0]
        with_key = key_interceptors(key_from_environment())
        async with rpc.open_channel(leader, self._tls, role="balancer", interceptors=with_key) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    async def status(self) -> admin_pb2.GetStatusResponse | None:
        """None when no balancer answers, or this process may not ask."""
        async with self.admin() as stub:
            try:
                return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return None
