"""What a dashboard is made of: panels of a title, a unit and queries each; ``generate.py`` makes Grafana's JSON of it.

Latencies of requests are those of the router (``role="router"``): the client's view, queueing and replays included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RATE = "$__rate_interval"
STEPS = "expertmesh_step_duration_seconds_count"
MODEL = 'model_name=~"$model"'
ROUTER = f'role="router",{MODEL}'


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the legend of its series."""

    expr: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """``unit`` is Grafana's name of it; ``stacked``: the series add up to something; ``width`` of 24."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    description: str = ""
    stacked: bool = False
    width: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """``uid`` is also the name of its file."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Per second, summed over all series but those of the label ``by``."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({metric}{{{labels}}}[{RATE}]))"


def quantile(share: float, metric: str, labels: str = "", by: str = "") -> str:
    group = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({group}) (rate({metric}_bucket{{{labels}}}[{RATE}])))"


def mean(metric: str, labels: str = "", by: str = "") -> str:
    return f"{rate(metric + '_sum', labels, by)} / {rate(metric + '_count', labels, by)}"


def quantiles(metric: str, labels: str = "") -> list[Query]:
    """p50, p95 and p99, with the traces that they are made of."""
    return [Query(quantile(share, metric, labels), f"p{share * 100:g}", exemplars=True) for share in (0.5, 0.95, 0.99)]
