"""Whether requests meet their objectives: the goodput of a router."""

from __future__ import annotations

import grpc

from expertmesh.mesh.telemetry import Metrics

OURS = frozenset(
    {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Refusals that count against the service; the others are the client's doing."""


class Objectives:
    """A request is judged once, when it ends: not at all where it was the client's doing that it did not.

    Args:
        ttft_s: from arrival to the first token.
        tpot_s: mean time of each further token.
    """

    def __init__(self, metrics: Metrics, *, ttft_s: float, tpot_s: float) -> None:
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s
        self._goodput = metrics.goodput_tokens.labels()
        self._cells = {
            (objective, met): metrics.slo_requests.labels(objective=objective, met="true" if met else "false")
            for objective in ("served", "ttft", "tpot", "all")
            for met in (True, False)
        }

    def ended(self, ttft_s: float, decode_s: float, num_tokens: int) -> None:
        """With its output. ``decode_s``: from the first token to the last of ``num_tokens``."""
        ttft_met = ttft_s <= self._ttft_s
        tpot_met = decode_s <= self._tpot_s * max(num_tokens - 1, 0)
        is_good = ttft_met and tpot_met
        self._judge(served=True, ttft=ttft_met, tpot=tpot_met, all=is_good)
        if is_good:
            self._goodput.add(num_tokens)

    def refused(self, code: grpc.StatusCode) -> None:
        """Ended by a status. Where it is ours, it met none of them: a token that never comes is late too."""
        if code in OURS:
            self._judge(served=False, ttft=False, tpot=False, all=False)

    def _judge(self, **met: bool) -> None:
        for objective, is_met in met.items():
            self._cells[objective, is_met].add(1)
