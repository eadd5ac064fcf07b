"""What a scenario found, as one JSON object and one row of a table, and whether that is good enough."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from chaos.traffic import Recording


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Upper bounds. Lost and wrong requests have one for ever: none."""

    longest_gap_s: float | None = None
    adopted_s: float | None = None
    takeover_s: float | None = None
    tpot_ratio: float | None = None
    lost_goodput: float | None = None


@dataclass(kw_only=True)
class Outcome:
    """Figures of one scenario.

    Attributes:
        requests: all that were sent; each of them was compared.
        lost: ended without their full output.
        wrong: brought a token that is not the reference's.
        replays: attention servers that requests lost and survived.
        longest_gap_s: between two tokens of one stream that was open during the faults.
        longest_first_token_s: from a request that was open during the faults to its first token.
        quiet_gap_s: the longest gap before the first fault, on the same mesh in the same minute.
        recovery_s: for each fault, until every server stepped in one view again.
        figures: what only this scenario measures.
        problems: what broke a promise other than a bound on time.
    """

    scenario: str
    seed: int
    long: bool
    requests: int = 0
    tokens: int = 0
    lost: int = 0
    wrong: int = 0
    replays: int = 0
    longest_gap_s: float = 0.0
    longest_first_token_s: float = 0.0
    quiet_gap_s: float = 0.0
    recovery_s: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)
    problems: list[str] = field(default_factory=list)

    def count(self, recordings: Sequence[Recording], faults_s: float, ended_s: float) -> None:
        """Take in the traffic, with the time of the first fault and the one when the mesh was whole again."""
        self.requests, self.tokens = len(recordings), sum(len(recording.token_ids) for recording in recordings)
        self.lost = sum(recording.is_lost for recording in recordings)
        self.wrong = sum(recording.is_wrong for recording in recordings)
        self.replays = sum(recording.finish.replays for recording in recordings if recording.finish is not None)
        gaps = [gap for recording in recordings for gap in recording.gaps()]
        self.quiet_gap_s = max((end - start for start, end in gaps if end < faults_s), default=0.0)
        self.longest_gap_s = max((b - a for a, b in gaps if b >= faults_s and a <= ended_s), default=0.0)
        first = [(r.sent_s, r.arrived_s[0]) for r in recordings if r.arrived_s]
        self.longest_first_token_s = max((b - a for a, b in first if b >= faults_s and a <= ended_s), default=0.0)
        errors = sorted({recording.error for recording in recordings if recording.error})
        self.problems += [f"a request ended with {error}" for error in errors[:5]]

    def failures(self, slack: float = 1.0) -> list[str]:
        """Why this is not good enough. ``slack`` widens the bounds on time; what is lost or wrong knows none."""
        found = list(self.problems)
        if self.requests == 0:
            found.append("no request was sent")
        found += [f"{name}: {count} requests" for name, count in (("lost", self.lost), ("wrong", self.wrong)) if count]
        measured = {"longest_gap_s": self.longest_gap_s, **self.figures}
        for name, bound in asdict(self.targets).items():
            if bound is not None and not measured[name] <= bound * slack:
                found.append(f"{name} is {measured[name]:.2f}, more than {bound:g}" + (f" × {slack:g}" * (slack != 1)))
        return found

    def as_json(self) -> str:
        return json.dumps(_rounded({**asdict(self), "failures": self.failures()}))


def tpot_ms(recordings: Iterable[Recording], percentile: float) -> float:
    """Of the requests that ended: the given percentile of the mean time between tokens."""
    return float(np.percentile([1e3 * r.tpot_s for r in recordings if not r.is_lost], percentile))


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a scenario, in Markdown."""
    lines = [
        "| scenario | requests | lost | wrong | longest gap s | target | undisturbed | mesh whole again after s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        bound = outcome.targets.longest_gap_s
        cells = (
            outcome.scenario,
            outcome.requests,
            outcome.lost,
            outcome.wrong,
            f"{outcome.longest_gap_s:.2f}",
            "–" if bound is None else f"≤ {bound:g}",
            f"{outcome.quiet_gap_s:.2f}",
            f"{np.median(outcome.recovery_s):.1f}" if outcome.recovery_s else "–",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
