"""A rate that is kept in bursts."""

from __future__ import annotations

_BURST_S = 0.1
"""What the allowed rate lets go in so long goes at once: few long pauses wake fewer threads than many short ones."""
_SMALLEST_PIECE, _LARGEST_PIECE = 1 << 14, 1 << 20


class Pace:
    """How fast bytes may go. Times are monotonic seconds."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = self._rate = bytes_per_s
        self._paid_s = 0.0  # when the rate has made up for what has gone
        self.resume_s = 0.0
        """Nothing more may go before."""

    @property
    def piece(self) -> int:
        """Bytes that are to be handed to the kernel in one call."""
        return max(min(int(self._rate * _BURST_S), _LARGEST_PIECE), _SMALLEST_PIECE)

    def hurry(self, bytes_per_s: float) -> None:
        """From now on at least so fast, and else as fast as is allowed."""
        self._rate = max(self._bytes_per_s, bytes_per_s)

    def pay(self, num_bytes: int, now: float) -> None:
        """So many have gone."""
        self._paid_s = max(self._paid_s, now) + num_bytes / self._rate
        self.resume_s = self._paid_s if self._paid_s - now >= _BURST_S else 0.0
