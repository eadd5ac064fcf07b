"""etcd as ``KeyValues``: the few calls that the balancer needs, of any member, with TLS and a user if etcd wants them.

Built on the messages and stubs of PyPI's ``aetcd``. Its own client has no TLS, speaks to one member only, and keeps a
token for ever that etcd forgets, so the channel and the calls are made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import grpc

from expertmesh.balancer.keyvalue import Entry, Guard, Lease, UnreachableError
from expertmesh.mesh import rpc
from expertmesh.mesh.config import EtcdConfig, TlsConfig
from expertmesh.mesh.config_security import ETCD_PASSWORD_VARIABLE
from expertmesh.mesh.errors import UserError

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 1.0
_OPTIONS = (
    # etcd drops clients that ping it more often than every 5 s. Silence is noticed by each call's own time-out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""Another member may answer."""


class EtcdClient:
    """Made on the event loop; ``close`` it. Calls ask the members in turn, from the one that answered last.

    Raises:
        UserError: aetcd is not installed, or a file that the configuration names cannot be used.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._rpc = _aetcd()
        self._user = config.user
        self._password = _password(config)
        self._token = ""
        tls = TlsConfig(cert_file=config.cert_file, key_file=config.key_file, ca_file=config.ca_file)
        self._members = deque(
            _Member(endpoint, rpc.open_channel(endpoint, tls, options=_OPTIONS, section="balancer.etcd"), self._rpc)
            for endpoint in config.endpoints
        )

    async def close(self) -> None:
        for member in self._members:
            await member.channel.close()

    # KeyValues

    async def get(self, key: str) -> Entry | None:
        answer = await self._call(_range, self._rpc.RangeRequest(key=key.encode()))
        return _entry(answer.kvs[0]) if answer.kvs else None

    async def list_keys(self, prefix: str) -> list[str]:
        request = self._rpc.RangeRequest(key=prefix.encode(), range_end=_end_of(prefix), keys_only=True)
        return [pair.key.decode() for pair in (await self._call(_range, request)).kvs]

    async def transact(
        self, guard: Guard, *, puts: Mapping[str, bytes] | None = None, deletes: Sequence[str] = (), lease: int = 0
    ) -> bool:
        made = self._rpc
        request = made.TxnRequest(
            compare=[
                made.Compare(
                    key=guard.key.encode(),
                    target=made.Compare.CREATE,
                    result=made.Compare.EQUAL,
                    create_revision=guard.create_revision,
                )
            ],
            success=[
                made.RequestOp(request_put=made.PutRequest(key=key.encode(), value=value, lease=lease))
                for key, value in (puts or {}).items()
            ]
            + [
                made.RequestOp(
                    request_delete_range=made.DeleteRangeRequest(
                        key=key.encode(), range_end=_end_of(key) if key.endswith("/") else b""
                    )
                )
                for key in deletes
            ],
        )
        return bool((await self._call(_transact, request)).succeeded)

    async def grant(self, ttl_s: int) -> Lease:
        answer = await self._call(_grant, self._rpc.LeaseGrantRequest(TTL=ttl_s))
        if ttl_s < answer.TTL:
            log.warning(
                "etcd grants leases of %d s at least: balancer.etcd.lease_s = %d has no effect", answer.TTL, ttl_s
            )
        return Lease(id=answer.ID, ttl_s=float(answer.TTL))

    async def renew(self, lease: int) -> float:
        return float((await self._call(_renew, self._rpc.LeaseKeepAliveRequest(ID=lease))).TTL)

    async def revoke(self, lease: int) -> None:
        await self._call(_revoke, self._rpc.LeaseRevokeRequest(ID=lease))

    async def wait_deleted(self, key: str, after: int, timeout_s: float) -> None:
        made, member = self._rpc, self._members[0]
        request = made.WatchRequest(
            create_request=made.WatchCreateRequest(
                key=key.encode(), start_revision=after + 1, filters=[made.WatchCreateRequest.NOPUT]
            )
        )
        call = member.watch.Watch(timeout=timeout_s, metadata=self._metadata())
        try:
            await call.write(request)
            while isinstance(answer := await call.read(), made.WatchResponse):
                if answer.events or answer.canceled:
                    return
        except (
            grpc.aio.AioRpcError,
            grpc.aio.UsageError,
            asyncio.InvalidStateError,
        ):  # the next question finds out what is wrong
            return
        finally:
            call.cancel()

    # Calls

    async def _call(self, method: Callable[[_Member, Any, Any], Any], request: Any) -> Any:
        last: grpc.aio.AioRpcError | None = None
        for _ in range(len(self._members)):
            try:
                return await self._ask(self._members[0], method, request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _ELSEWHERE:
                    raise self._refusal(error) from None
                last = error
                self._members.rotate(-1)
        assert last is not None, "there is a member at least"
        names = ", ".join(member.endpoint for member in self._members)
        raise UnreachableError(
            f"balancer.etcd.endpoints: no answer from {names} ({last.code().name}: {last.details()})"
        )

    async def _ask(self, member: _Member, method: Callable[[_Member, Any, Any], Any], request: Any) -> Any:
        if self._user is not None and not self._token:
            await self._log_in(member)
        try:
            return await method(member, request, self._metadata())
        except grpc.aio.AioRpcError as error:
            if self._user is None or error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            await self._log_in(member)  # etcd forgets tokens that were not used for a while
            return await method(member, request, self._metadata())

    async def _log_in(self, member: _Member) -> None:
        request = self._rpc.AuthenticateRequest(name=self._user, password=self._password)
        self._token = (await member.auth.Authenticate(request, timeout=_CALL_TIMEOUT_S)).token

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()

    def _refusal(self, error: grpc.aio.AioRpcError) -> OSError:
        details = error.details() or ""
        if "auth" in details or "user" in details or error.code() is grpc.StatusCode.PERMISSION_DENIED:
            return PermissionError(f"balancer.etcd.user: {self._user or 'no user'} is refused by etcd ({details})")
        return OSError(f"etcd answered {error.code().name}: {details}")

    async def check(self, prefix: str) -> None:
        """
        Raises:
            UserError: etcd answers, and refuses this user. One that does not answer may yet come.
        """
        with contextlib.suppress(UnreachableError):
            try:
                await self.list_keys(prefix)
            except PermissionError as error:
                raise UserError(
                    "balancer.etcd.user",
                    str(error).partition(": ")[2],
                    "give a user that may read and write below balancer.etcd.prefix, and its password in "
                    f"balancer.etcd.password_file or {ETCD_PASSWORD_VARIABLE}",
                ) from None


class _Member:
    """One member of the cluster."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel, made: ModuleType) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self.kv = made.KVStub(channel)
        self.leases = made.LeaseStub(channel)
        self.watch = made.WatchStub(channel)
        self.auth = made.AuthStub(channel)


async def _range(member: _Member, request: Any, metadata: Any) -> Any:
    return await member.kv.Range(request, timeout=_CALL_TIMEOUT_S, metadata=metadata)


async def _transact(member: _Member, request: Any, metadata: Any) -> Any:
    return await member.kv.Txn(request, timeout=_CALL_TIMEOUT_S, metadata=metadata)


async def _grant(member: _Member, request: Any, metadata: Any) -> Any:
    return await member.leases.LeaseGrant(request, timeout=_CALL_TIMEOUT_S, metadata=metadata)


async def _renew(member: _Member, request: Any, metadata: Any) -> Any:
    """A stream by etcd's contract; of one question here."""
    call = member.leases.LeaseKeepAlive(iter([request]), timeout=_CALL_TIMEOUT_S, metadata=metadata)
    try:
        async for answer in call:
            return answer
    finally:
        call.cancel()
    raise OSError("etcd answered a renewal with nothing")


async def _revoke(member: _Member, request: Any, metadata: Any) -> Any:
    try:
        return await member.leases.LeaseRevoke(request, timeout=_CALL_TIMEOUT_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return None


@asynccontextmanager
async def connected(config: EtcdConfig) -> AsyncIterator[EtcdClient]:
    """
    Raises:
        UserError: as ``EtcdClient``.
    """
    client = EtcdClient(config)
    try:
        yield client
    finally:
        await client.close()


def _entry(pair: Any) -> Entry:
    return Entry(
        value=pair.value, create_revision=pair.create_revision, mod_revision=pair.mod_revision, lease=pair.lease
    )


def _end_of(prefix: str) -> bytes:
    """The first key after all that begin with ``prefix``, which does not end with U+10FFFF."""
    return prefix.encode()[:-1] + bytes([prefix.encode()[-1] + 1])


def _aetcd() -> ModuleType:
    try:
        import aetcd.rpc
    except ImportError:
        raise UserError(
            "balancer.state",
            "etcd needs the Python package aetcd",
            "pip install 'expertmesh[etcd]', or use state: file",
        ) from None
    module: ModuleType = aetcd.rpc
    return module


def _password(config: EtcdConfig) -> str:
    if config.user is None:
        return ""
    if config.password_file is None:
        if ETCD_PASSWORD_VARIABLE not in os.environ:
            raise UserError(
                "balancer.etcd.password_file",
                f"is unset, and so is {ETCD_PASSWORD_VARIABLE}",
                f"name the file that holds the password of {config.user}",
            )
        return os.environ[ETCD_PASSWORD_VARIABLE]
    try:
        return config.password_file.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "balancer.etcd.password_file", f"{config.password_file} cannot be read ({error})", "name a text file"
        ) from None
