"""The state in etcd, written by whoever leads.

etcd takes requests of 1.5 MB at most, and a mesh with many layers may have more to say: the document is compressed and
cut into parts. The parts of a new *generation* go beside those of the old one; the transaction that writes the last
part names the generation in the key ``state`` and deletes the old one, so that a reader finds one of the two whole.
Each transaction compares the leader's key.
"""

from __future__ import annotations

import asyncio
import json
import zlib

from expertmesh.balancer.election import Term
from expertmesh.balancer.keyvalue import DeposedError, KeyValues
from expertmesh.balancer.state import DurableState, decode, encode
from expertmesh.mesh.errors import UserError

PART_BYTES = 2**20
_MAX_DELETES = 100  # etcd takes 128 operations in a transaction
_FAST = 1  # of zlib's levels; the state is mostly numbers below 1000, and is written at every migration


class EtcdState:
    """``StateKeeper`` of one term.

    Args:
        prefix: of the mesh's keys, without a slash at its end.
    """

    def __init__(self, kv: KeyValues, prefix: str, term: Term, part_bytes: int = PART_BYTES) -> None:
        self._kv = kv
        self._head = f"{prefix}/state"
        self._term = term
        self._part_bytes = part_bytes
        self._count = 0
        self._old: set[str] = set()  # generations to be deleted when the next one is whole

    async def load(self) -> DurableState | None:
        """None when no balancer ever saved any.

        Raises:
            OSError: it could not be read.
            UserError: what is there is not whole.
        """
        below = len(self._head) + 1
        self._old = {key[below:].partition("/")[0] for key in await self._kv.list_keys(f"{self._head}/")}
        head = await self._kv.get(self._head)
        if head is None:
            return None
        try:
            fields = json.loads(head.value)
            parts = [await self._part(fields["generation"], index) for index in range(fields["parts"])]
            return await asyncio.to_thread(_unpack, b"".join(parts))
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise UserError(
                "balancer.etcd.prefix",
                f"the state below {self._head} is damaged ({error})",
                "delete these keys to start without: a mesh that runs is then adopted from what its servers bring",
            ) from None

    async def _part(self, generation: str, index: int) -> bytes:
        entry = await self._kv.get(self._key(generation, index))
        if entry is None:
            raise ValueError(f"part {index} of generation {generation} is missing")
        return entry.value

    async def save(self, state: DurableState) -> None:
        """
        Raises:
            DeposedError: the term is over; what is there now is another leader's.
            OSError: it could not be written; what was saved before is untouched.
        """
        data = await asyncio.to_thread(_pack, state)
        parts = [data[start : start + self._part_bytes] for start in range(0, len(data), self._part_bytes)]
        self._count += 1
        generation = f"{self._term.number}-{self._count}"
        self._old.add(generation)  # until it is whole
        for index, part in enumerate(parts[:-1]):
            await self._write({self._key(generation, index): part})
        head = json.dumps({"generation": generation, "parts": len(parts)}).encode()
        last = {self._key(generation, len(parts) - 1): parts[-1], self._head: head}
        old = sorted(self._old - {generation})[:_MAX_DELETES]
        await self._write(last, [f"{self._head}/{name}/" for name in old])
        self._old.difference_update(old)

    async def _write(self, puts: dict[str, bytes], deletes: list[str] | None = None) -> None:
        if not await self._kv.transact(self._term.guard, puts=puts, deletes=deletes or ()):
            self._term.end("another balancer leads")
            raise DeposedError("another balancer leads: nothing was written")

    def _key(self, generation: str, index: int) -> str:
        return f"{self._head}/{generation}/{index:04d}"


def _pack(state: DurableState) -> bytes:
    return zlib.compress(encode(state), _FAST)


def _unpack(data: bytes) -> DurableState:
    return decode(zlib.decompress(data))
