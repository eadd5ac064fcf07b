"""Which requests count against the service, and which met its objectives."""

from __future__ import annotations

import grpc
import pytest

from expertmesh.mesh.telemetry import Metrics
from expertmesh.router.slo import Objectives


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(role="router")


def judged(metrics: Metrics) -> dict[str, tuple[float, float]]:
    """Objective → requests that met it, and that did not."""
    cells = {(labels["objective"], labels["met"]): cell.read() for labels, cell in metrics.slo_requests.series()}
    return {name: (cells[name, "true"], cells[name, "false"]) for name in ("served", "ttft", "tpot", "all")}


@pytest.mark.parametrize(
    ("ttft_s", "decode_s", "expected", "goodput"),
    [
        (1.0, 0.9, {"ttft": (1, 0), "tpot": (1, 0), "all": (1, 0)}, 10),
        (1.1, 0.9, {"ttft": (0, 1), "tpot": (1, 0), "all": (0, 1)}, 0),
        (1.0, 1.0, {"ttft": (1, 0), "tpot": (0, 1), "all": (0, 1)}, 0),
    ],
)
def test_a_request_that_ended(
    metrics: Metrics, ttft_s: float, decode_s: float, expected: dict[str, tuple[int, int]], goodput: int
) -> None:
    Objectives(metrics, ttft_s=1.0, tpot_s=0.1).ended(ttft_s, decode_s, num_tokens=10)
    assert judged(metrics) == {"served": (1, 0), **expected}
    assert metrics.goodput_tokens.labels().read() == goodput


def test_one_token_has_no_pace(metrics: Metrics) -> None:
    Objectives(metrics, ttft_s=1.0, tpot_s=0.1).ended(0.5, 0.0, num_tokens=1)
    assert judged(metrics)["all"] == (1, 0)


def test_refusals_count_where_they_are_ours(metrics: Metrics) -> None:
    objectives = Objectives(metrics, ttft_s=1.0, tpot_s=0.1)
    for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.CANCELLED):
        objectives.refused(code)
    assert set(judged(metrics).values()) == {(0, 0)}
    objectives.refused(grpc.StatusCode.UNAVAILABLE)
    assert set(judged(metrics).values()) == {(0, 1)}
