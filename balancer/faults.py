"""Memory of what went wrong, so that one bad server cannot break view after view."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

SUSPECTED_VIEWS = 3
SUSPECTED_BY = 2
SUSPICION_WINDOW_S = 60.0
MAX_QUARANTINE_S = 600.0


class Suspicions:
    """Finds the server that peers name again and again when views break.

    It takes ``SUSPECTED_BY`` peers in each of the last ``SUSPECTED_VIEWS`` broken views, and more accusations than
    anyone else has: when two halves of a mesh accuse each other (a network cut), nobody is the culprit.
    """

    def __init__(self) -> None:
        self._broken: deque[tuple[float, Counter[str]]] = deque(maxlen=SUSPECTED_VIEWS)

    def record(self, reports: Mapping[str, Sequence[str]], now: float) -> None:
        """``reports``: reporter → suspects of one broken view, in the order in which they came.

        Naming a server that had reported already proves nothing: it closed its links because the view was over.
        """
        accusations: Counter[str] = Counter()
        reported: set[str] = set()
        for reporter, suspects in reports.items():
            reported.add(reporter)
            accusations.update(set(suspects) - reported)
        self._broken.append((now, accusations))

    def culprit(self, now: float) -> str | None:
        if len(self._broken) < SUSPECTED_VIEWS or now - self._broken[0][0] > SUSPICION_WINDOW_S:
            return None
        total: Counter[str] = sum((accusations for _, accusations in self._broken), Counter())
        if not total:
            return None
        worst, most = total.most_common(1)[0]
        alone = sum(count == most for count in total.values()) == 1
        always = all(accusations[worst] >= SUSPECTED_BY for _, accusations in self._broken)
        return worst if alone and always else None

    def clear(self) -> None:
        self._broken.clear()


class Strikes:
    """Servers that did not come up in a view in time; from the second time in a row on they wait, longer each time."""

    def __init__(self, base_s: float) -> None:
        self._base_s = base_s
        self._strikes: dict[str, tuple[int, float]] = {}

    def add(self, server_id: str, now: float) -> float:
        """Returns for how many seconds the server is kept out of views."""
        count = self._strikes.get(server_id, (0, 0.0))[0] + 1
        wait_s = 0.0 if count == 1 else min(self._base_s * 2 ** (count - 2), MAX_QUARANTINE_S)
        self._strikes[server_id] = (count, now + wait_s)
        return wait_s

    def is_waiting(self, server_id: str, now: float) -> bool:
        return now < self._strikes.get(server_id, (0, now))[1]

    def clear(self, server_id: str) -> None:
        self._strikes.pop(server_id, None)
