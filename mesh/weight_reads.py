"""Expert weights by NIXL: the destination reads them out of the source's slots, straight into its spare memory.

Over the side link goes a ticket, little-endian: ``_TICKET``, the address of each part of the expert, the metadata of
the source's agent. The link is one that its peer has proved to be that rank's, so the metadata is believed; how much is
read the destination knows by itself, and NIXL refuses what the source has not registered.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import ExpertHalf, ExpertWeights
from expertmesh.mesh.nixl_agent import NixlAgent
from expertmesh.mesh.nixl_reads import Reading, Span
from expertmesh.mesh.nixl_setup import Purpose, load_nixl
from expertmesh.mesh.side_transfers import TransferError, num_bytes_of

log = logging.getLogger(__name__)

_TICKET = struct.Struct("<QIB")  # bytes of the expert, the device's number, whether it is the host
_KEY = "balancer.migration_transport"
_WEIGHTS = Purpose(key=_KEY, what="expert weights", where="the slots", remedy="set it to tcp")


class SlotMemory:
    """A ``Memory``: all tensors in which experts are or are put together, each contiguous, of one device."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        assert all(part.is_contiguous() for part in parts), "registered as a whole"
        self._parts = tuple(parts)
        self.device = parts[0].device

    @property
    def is_on_host(self) -> bool:
        return self.device.type == "cpu"

    def regions(self) -> list[tuple[int, int]]:
        return [(part.data_ptr(), part.nbytes) for part in self._parts]

    def span(self, weights: ExpertWeights) -> Span:
        """Of an expert that is in this memory."""
        return _span([part.data_ptr() for part in weights], weights, self.device.index or 0, on_host=self.is_on_host)


class WeightReads:
    """What a rank's slots give and take by NIXL, from view to view; ``close`` it at the end.

    Args:
        host: address of the interface to be reached at.

    Raises:
        UserError: NIXL is not installed, or cannot use the memory.
    """

    def __init__(self, memory: SlotMemory, host: str) -> None:
        self._memory = memory
        self._agent = NixlAgent(memory, host, _WEIGHTS)

    def close(self) -> None:
        """As ``NixlAgent.close``."""
        self._agent.close()

    def ticket(self, weights: ExpertWeights) -> bytes:
        """What a peer needs to read this expert, which is in our memory."""
        head = _TICKET.pack(num_bytes_of(weights), self._memory.device.index or 0, self._memory.is_on_host)
        addresses = np.array([part.data_ptr() for part in weights], "<u8").tobytes()
        return head + addresses + self._agent.metadata

    def lend(self, borrower: Hashable, until_s: float) -> None:
        """A peer may be reading, until ``take_back`` or a monotonic time; see ``NixlAgent.lend``."""
        self._agent.lend(borrower, until_s)

    def take_back(self, borrower: Hashable) -> None:
        self._agent.take_back(borrower)

    def quiet(self) -> Callable[[], bool]:
        """Whether the steps that have been launched until now are over: those may still read what was in memory that
        is spare. From any thread."""
        if self._memory.is_on_host:
            return lambda: True
        launched = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        launched.record(torch.cuda.default_stream(self._memory.device))
        return launched.query

    def read(self, ticket: bytes, into: ExpertWeights, may_begin: Callable[[], bool]) -> Reading:
        """Begin to read an expert into memory of ours.

        Raises:
            TransferError: the ticket is not for an expert of this shape.
        """
        size = _TICKET.size + 8 * len(into)
        if len(ticket) <= size:
            raise TransferError(f"a ticket of {len(ticket)} bytes", "checksum")
        num_bytes, device, on_host = _TICKET.unpack_from(ticket)
        addresses = np.frombuffer(ticket[_TICKET.size : size], "<u8").tolist()
        if num_bytes != num_bytes_of(into):
            raise TransferError(f"an offer of {num_bytes} bytes instead of {num_bytes_of(into)}", "checksum")
        if max(addresses) + num_bytes >= 1 << 64:
            raise TransferError("an offer of addresses that do not exist", "checksum")
        theirs = _span(addresses, into, device, on_host=bool(on_host))
        return self._agent.start(ticket[size:], theirs, self._memory.span(into), may_begin)


class WeightTransport:
    """How a rank's experts come from other ranks: what ``balancer.migration_transport`` asks for, and what there is.

    Args:
        encrypts: links between ranks are encrypted.

    Raises:
        UserError: NIXL is asked for and not installed, or everything between ranks has to be encrypted.
    """

    def __init__(self, config: MeshConfig, experts: ExpertHalf | None, device: torch.device, *, encrypts: bool) -> None:
        self._is_asked_for = config.balancer.migration_transport == "nixl"
        self._host = config.dataplane.interface_host
        self._encrypts = encrypts
        self._experts = None if config.balancer.migration_transport == "tcp" else experts
        self._reads: WeightReads | None = None
        if device.type == "cpu" and not self._is_asked_for:
            self._experts = None
        if self._experts is None:
            return
        if encrypts and config.dataplane.tls == "on":
            if self._is_asked_for:
                raise UserError(
                    "dataplane.tls",
                    "is on, and NIXL moves expert weights in the clear",
                    f"set {_KEY}: tcp, or dataplane.tls: auto and a network that others cannot reach",
                )
            self._experts = None
        if self._is_asked_for:
            load_nixl(_WEIGHTS)

    def reads(self) -> WeightReads | None:
        """None = weights come by TCP. From the step thread, when the first view begins that has other expert ranks: one
        that is alone has nothing to open.

        Raises:
            UserError: NIXL is asked for and cannot be used.
        """
        if self._experts is None or self._reads is not None:
            return self._reads
        try:
            self._reads = WeightReads(SlotMemory(self._experts.memory()), self._host)
        except UserError as error:
            if self._is_asked_for:
                raise
            log.info("expert weights come from other ranks by tcp: %s", error)
            self._experts = None
            return None
        log.info("expert weights come from other ranks by nixl")
        if self._encrypts:
            log.warning("expert weights that travel by NIXL are not encrypted, though links between ranks are")
        return self._reads

    def close(self) -> None:
        """As ``NixlAgent.close``, when no view runs any more."""
        if self._reads is not None:
            self._reads.close()


def _span(addresses: Sequence[int], like: ExpertWeights, device: int, *, on_host: bool) -> Span:
    pieces = [(address, part.nbytes, device) for address, part in zip(addresses, like, strict=True)]
    return Span(pieces_P3=np.array(pieces, np.uint64), on_host=on_host)
