"""The Helm chart as pods live with it: where they run, what they may write, how many there are, how they end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from expertmesh.cli.ranks import STOP_TIMEOUT_S as RANKS_STOP_S
from expertmesh.mesh.telemetry.metrics import declarations
from expertmesh.mesh.telemetry.tables.declared import ATTENTION
from expertmesh.router.server import DRAIN_TIMEOUT_S as ROUTER_DRAIN_S
from support.helm import CHART, RANK_ROLES, ROOT, container, each_values, rendered

pytestmark = pytest.mark.slow


@each_values
def test_pods_have_the_time_that_draining_takes(values: Path) -> None:
    for role, pod in rendered(values).pods.items():
        before = container(pod).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert (before > 0) is (role == "router"), "services lead to it for a moment more, and a draining one refuses"
        drain_s = {"router": ROUTER_DRAIN_S, "balancer": 0}.get(role, RANKS_STOP_S)
        assert pod["spec"]["terminationGracePeriodSeconds"] >= before + drain_s + 3


def test_a_long_sleep_before_the_end_takes_nothing_from_draining() -> None:
    pod = rendered(CHART / "values.yaml", "router.preStopSeconds=120").pods["router"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 120 + ROUTER_DRAIN_S + 3


@each_values
def test_what_a_pod_may_write_is_bounded(values: Path) -> None:
    for role, pod in rendered(values).pods.items():
        empty = {volume["name"]: volume["emptyDir"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        assert {"cache", "tmp"} <= empty.keys()
        assert (role in RANK_ROLES) is ("shm" in empty)
        for name, volume in empty.items():
            assert "sizeLimit" in volume or volume["medium"] == "HugePages-2Mi", f"{role} {name}"


@pytest.mark.parametrize("role", ["router", "balancer", "attention"])
def test_a_component_has_nodes_of_its_own(role: str) -> None:
    settings = [f"{role}.{key}" for key in ("nodeSelector.pool=a", "priorityClassName=high", "tolerations[0].key=b")]
    made = rendered(CHART / "values.yaml", *settings)
    for other, pod in made.pods.items():
        spec = pod["spec"]
        found = (spec.get("nodeSelector"), spec.get("priorityClassName"), spec.get("tolerations"))
        assert found == (({"pool": "a"}, "high", [{"key": "b"}]) if other == role else (None, None, None))


def test_autoscaling_takes_what_can_be_scaled() -> None:
    made = rendered(CHART / "values-production.yaml")
    targets = {
        role: (hpa["spec"]["scaleTargetRef"]["kind"], hpa["spec"]["scaleTargetRef"]["name"])
        for role, hpa in made.of_kind("HorizontalPodAutoscaler").items()
    }
    assert targets == {
        "router": ("Deployment", "mesh-expertmesh-router"),
        "attention": ("LeaderWorkerSet", "mesh-expertmesh-attention"),
    }
    assert made.config.scaling.policy == "off", "two who scale would work against each other"
    for role, (kind, _) in targets.items():
        assert "replicas" not in made.of_kind(kind)[role]["spec"], "an upgrade must not take the scaler's number back"


def test_autoscaling_follows_metrics_that_attention_servers_export() -> None:
    """Adapter rules of docs/kubernetes.md, name by name: from the registry of metrics to the scaler."""
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(rules:.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    declared = {metric.name: metric for metric in declarations()}
    offered = {}
    for rule in yaml.safe_load(block)["rules"]:
        series = rule["seriesQuery"].split('"')[1]
        assert declared[series].starts_on == ATTENTION, series
        offered[rule["name"]["as"]] = series
    scaler = rendered(CHART / "values-production.yaml").of_kind("HorizontalPodAutoscaler")["attention"]
    asked = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert sorted(asked) == sorted(offered)
