"""The Helm chart's network policies: they let through what docs/design.md names, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from support import helm
from support.helm import CHART, RANK_ROLES, ROOT, Document, container, each_values, rendered

pytestmark = pytest.mark.slow

Flow = tuple[str, str, int]
"""From, to, port; who is from outside goes by the name in docs/design.md."""


def promised_flows(made: helm.Rendered) -> set[Flow]:
    """Of docs/design.md's table, between the components that there are."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = text.split("Who calls whom")[1].split("Beyond the mesh")[0]
    rows = re.findall(r"^\| (\w+) \| (\w+) \| `([a-z_.]+)` \|", table, flags=re.MULTILINE)
    assert len(rows) > 5
    ranks = [role for role in RANK_ROLES if role in made.pods]
    groups = {"ranks": ranks, "all": list(made.pods), "attention": [role for role in ranks if role != "expert"]}
    flows = set()
    for source, target, key in rows:
        value: Any = made.config
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None:
            pairs = ((a, b) for a in groups.get(source, [source]) for b in groups.get(target, [target]))
            flows |= {(a, b, value) for a, b in pairs}
    return flows


def ports_of(rule: Document) -> Iterable[int]:
    """The first of each range: further ranks of a pod have the next ones."""
    return [port["port"] for port in rule.get("ports", [])]


def peers_of(made: helm.Rendered, peers: Iterable[Document]) -> list[str]:
    """Components that a rule names; others as in docs/design.md, by the values that they come from."""
    outside = {
        json.dumps({"podSelector": {}}): "clients",
        json.dumps({"podSelector": {"matchLabels": {"expertmesh.io/operator": "true"}}}): "operators",
        json.dumps({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}): "Prometheus",
    }
    names = []
    for peer in peers:
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        chosen = [
            role for role, pod in made.pods.items() if labels and labels.items() <= pod["metadata"]["labels"].items()
        ]
        names += chosen or [outside[json.dumps(peer)]]
    return names


@each_values
def test_network_policies_allow_what_the_design_names_and_nothing_else(values: Path) -> None:
    # Without what NCCL needs, which is tested below.
    made = rendered(values, "networkPolicy.allPortsBetweenRanks=false", "networkPolicy.egress=null")
    policies = made.of_kind("NetworkPolicy")
    assert policies.keys() == made.pods.keys()
    allowed_in, allowed_out = set[Flow](), set[Flow]()
    for role, policy in policies.items():
        spec = policy["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert spec["podSelector"]["matchLabels"].items() <= made.pods[role]["metadata"]["labels"].items()
        for rule in spec["ingress"]:
            assert ports_of(rule)
            allowed_in |= {(peer, role, port) for peer in peers_of(made, rule["from"]) for port in ports_of(rule)}
        names, *calls = spec["egress"]
        assert sorted(ports_of(names)) == [53, 53], "the name server"
        for rule in calls:
            assert ports_of(rule)
            allowed_out |= {(role, peer, port) for peer in peers_of(made, rule["to"]) for port in ports_of(rule)}
    promised = promised_flows(made)
    assert allowed_in == promised
    assert allowed_out == {flow for flow in promised if flow[0] in made.pods}


@each_values
def test_policies_reach_all_ranks_of_a_pod(values: Path) -> None:
    made = rendered(values, "networkPolicy.allPortsBetweenRanks=false")
    for role, policy in made.of_kind("NetworkPolicy").items():
        listens = {port["containerPort"] for port in container(made.pods[role])["ports"]}
        opened = set[int]()
        for rule in policy["spec"]["ingress"]:
            for port in rule["ports"]:
                opened |= set(range(port["port"], port.get("endPort", port["port"]) + 1))
        # Nobody but the kubelet asks an expert server's gRPC.
        extra = made.config.expert.port if role == "expert" else None
        ranks = max(1, sum(name["name"].startswith("grpc-") for name in container(made.pods[role])["ports"]))
        assert opened == listens - ({extra + index for index in range(ranks)} if extra else set())


OTHER_MESH = {"podSelector": {"matchLabels": {"mesh": "other"}}}


def disaggregated(role: str, *settings: str) -> helm.Rendered:
    label = "networkPolicy.otherMesh[0].podSelector.matchLabels.mesh=other"
    return rendered(CHART / "values-cpu-demo.yaml", f"mesh.disaggregation.role={role}", label, *settings)


def rules_of(made: helm.Rendered, direction: str) -> dict[str, list[Document]]:
    """By component, the rules that name the other mesh."""
    key = {"ingress": "from", "egress": "to"}[direction]
    policies = made.of_kind("NetworkPolicy").items()
    found = {role: [rule for rule in p["spec"][direction] if OTHER_MESH in rule[key]] for role, p in policies}
    return {role: rules for role, rules in found.items() if rules}


def test_a_mesh_that_computes_prompts_lets_the_other_one_in() -> None:
    made = disaggregated("prefill")
    config, rules = made.config, rules_of(made, "ingress")
    assert config.disaggregation.port
    attention = {role for role in ("attention", "both") if role in made.pods}
    assert rules.keys() == {"balancer", *attention}
    (at_balancer,) = rules["balancer"]
    assert list(ports_of(at_balancer)) == [config.balancer.port]
    for role in attention:
        (rule,) = rules[role]
        assert set(ports_of(rule)) == {config.attention.port, config.disaggregation.port}
        listens = {port["containerPort"] for port in container(made.pods[role])["ports"]}
        assert {port["endPort"] for port in rule["ports"]} <= listens
    assert not rules_of(made, "egress")


def test_a_mesh_that_has_its_prompts_computed_calls_the_other_one() -> None:
    made = disaggregated("decode", "mesh.disaggregation.prefill_balancer=prefill-balancer:50050")
    assert rules_of(made, "egress").keys() == {"router", *({"attention", "both"} & made.pods.keys())}
    assert not rules_of(made, "ingress")
    assert made.config.disaggregation.port == 0


def test_without_another_mesh_nobody_more_is_let_in() -> None:
    """A rule without peers would let everybody in."""
    made = rendered(CHART / "values-cpu-demo.yaml", "mesh.disaggregation.role=prefill")
    for policy in made.of_kind("NetworkPolicy").values():
        assert all(rule["from"] for rule in policy["spec"]["ingress"])


@pytest.mark.parametrize("name", ["values-nvlink-8gpu.yaml", "values-efa.yaml"])
def test_gpu_ranks_meet_on_all_ports_and_nobody_else_does(name: str) -> None:
    made = rendered(CHART / name)
    for role, policy in made.of_kind("NetworkPolicy").items():
        for direction, key in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"][direction]:
                peers = peers_of(made, rule[key]) if "k8s-app" not in json.dumps(rule) else ["names"]
                between_ranks = role in RANK_ROLES and set(peers) <= set(RANK_ROLES)
                assert ("ports" not in rule) is between_ranks, f"{role} {rule}"
