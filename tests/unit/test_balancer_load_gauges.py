"""The gauges of the placement's quality, as /metrics shows them."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.balancer.load_gauges import INTERVAL_S, LoadGauges
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.statistics import Statistics
from expertmesh.mesh.telemetry.metrics import Metrics
from expertmesh.mesh.telemetry.prometheus import MetricsEndpoint
from expertmesh.v1 import mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World

Samples = dict[tuple[str, str], float]
NUM_PAIRS = 8 * 7 // 2
PREFIX = "expertmesh_balancer_"


class Stand:
    """A mesh of two expert ranks that serves, and its balancer's /metrics."""

    def __init__(self) -> None:
        self.world = World(config())
        self.world.form("a1", "e1", "e2")
        self.metrics = Metrics(role="balancer")
        self.routing = RoutingDesk(self.world.actual, Statistics(10**12), self.world.effects.send, lambda: 0.0)
        self.gauges = LoadGauges(self.routing, self.metrics)
        self.sequence = 0

    def report(self, *layers: tuple[int, int, list[int], int]) -> None:
        """(layer, version, rows sent to each rank, ranks that its 100 tokens visited)."""
        self.sequence += 1
        width = self.world.view.slots_per_rank
        report = mesh_pb2.StatsReport(sequence=self.sequence, view_number=1)
        for layer, version, (one, other), rank_visits in layers:
            report.layers.add(
                layer=layer,
                version=version,
                tokens=100,
                load=[100] + [0] * 7,
                coactivation=[0] * NUM_PAIRS,
                visit_tokens=100,
                rank_visits=rank_visits,
                node_visits=100,
                slot_load=[one] + [0] * (width - 1) + [other] + [0] * (width - 1),
            )
        session = self.world.servers["a1"].session
        self.routing.receive(session, mesh_pb2.JoinRequest(stats=report))

    def scrape(self, endpoint: MetricsEndpoint) -> Samples:
        with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name.removeprefix(PREFIX), sample.labels["over"]): round(sample.value, 3)
            for family in families
            for sample in family.samples
            if "over" in sample.labels
        }


@pytest.fixture
def stand() -> Stand:
    return Stand()


@pytest.fixture
def endpoint(stand: Stand) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(stand.metrics, "127.0.0.1", 0)
    yield endpoint
    endpoint.close()


def test_nothing_is_shown_before_traffic(stand: Stand, endpoint: MetricsEndpoint) -> None:
    stand.gauges.update(0.0)
    assert stand.scrape(endpoint) == {}


def test_the_layers_mean_worst_and_best_are_shown(stand: Stand, endpoint: MetricsEndpoint) -> None:
    stand.report((0, 1, [100, 100], 150), (2, 1, [50, 150], 200))
    stand.gauges.update(10.0)
    assert stand.scrape(endpoint) == {
        ("balancedness", "mean"): 0.833,
        ("balancedness", "min"): 0.667,
        ("balancedness", "max"): 1.0,
        ("fanout_ranks", "mean"): 1.75,
        ("fanout_ranks", "min"): 1.5,
        ("fanout_ranks", "max"): 2.0,
        ("fanout_nodes", "mean"): 1.0,
        ("fanout_nodes", "min"): 1.0,
        ("fanout_nodes", "max"): 1.0,
    }


def test_they_follow_the_traffic_once_an_interval(stand: Stand, endpoint: MetricsEndpoint) -> None:
    stand.report((0, 1, [100, 100], 100))
    stand.gauges.update(10.0)
    stand.report((0, 1, [0, 400], 200))
    stand.gauges.update(10.0 + INTERVAL_S / 2)
    assert stand.scrape(endpoint)["balancedness", "mean"] == 1.0
    stand.gauges.update(10.0 + INTERVAL_S)
    samples = stand.scrape(endpoint)
    assert (samples["balancedness", "mean"], samples["fanout_ranks", "mean"]) == (0.6, 1.5)


def test_a_layer_whose_placement_is_new_has_no_fanout_yet(stand: Stand, endpoint: MetricsEndpoint) -> None:
    stand.report((0, 1, [100, 100], 150), (2, 0, [100, 100], 200))  # layer 2: counted under the version before
    stand.gauges.update(10.0)
    samples = stand.scrape(endpoint)
    assert (samples["fanout_ranks", "min"], samples["fanout_ranks", "max"]) == (1.5, 1.5)
    assert samples["balancedness", "min"] < 1.0
