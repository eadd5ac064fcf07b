"""Dashboards and rules: what their code gives is committed, and the tools accept it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from expertmesh.mesh.telemetry.metrics import declarations
from support.dashboards import FOLDER, RULES, dashboards, generator, operands, panel_queries, rules
from support.prometheus import needs


def test_dashboards_and_rules_are_what_their_code_gives() -> None:
    made = {f"{board.uid}.json": generator().render(board) for board in generator().BOARDS}
    made[RULES.name] = generator().render_rules(generator().alerts.Limits())
    committed = {path.name: path.read_text(encoding="utf-8") for path in (*FOLDER.glob("*.json"), RULES)}
    assert committed == made, "run `make dashboards`"


def test_every_dashboard_has_panels_and_every_panel_queries() -> None:
    assert set(dashboards()) == {f"expertmesh-{name}.json" for name in ("requests", "mesh", "balancer")}
    for name, board in dashboards().items():
        titles = [panel["title"] for panel in board["panels"]]
        assert len(set(titles)) == len(titles) > 10, name
        for panel in board["panels"]:
            assert panel["type"] == "row" or panel["targets"], f"{name}: {panel['title']}"


def test_queries_name_metrics_that_exist() -> None:
    """Those of our prefixes, without the suffixes that exporters add."""
    names = {row.name for row in declarations()}
    suffixes = ("_total", "_bucket", "_sum", "_count")
    known = names | {name + suffix for name in names for suffix in suffixes}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for where, expr in {**panel_queries("1m"), **{str(rule): rule["expr"] for rule in rules()}}.items():
        selected = _metrics(promql_parser.parse(expr))
        assert selected <= known | recorded, f"{where}: {selected - known - recorded}"


def _metrics(node: object) -> set[str]:
    """The names that an expression selects."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, promql_parser.VectorSelector) and part.name:
            found.add(part.name)
        names = ("expr", "lhs", "rhs", "param", "vector_selector")
        waiting += [child for name in names if (child := getattr(part, name, None)) is not None]
        waiting += list(getattr(part, "args", None) or ())
    return found


def test_alerts_say_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) == 10
    for alert in alerts:
        assert set(alert["annotations"]) == {"summary", "remedy"}, alert["alert"]
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]


def test_what_an_alert_compares() -> None:
    assert operands("max(a) == 0 and on() sum(rate(b[5m])) > 0") == ["max(a)", "0", "sum(rate(b[5m]))", "0"]


@needs("promtool")
@pytest.mark.parametrize("command", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")])
def test_promtool_accepts_the_rules(command: tuple[str, ...]) -> None:
    run = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "SUCCESS" in run.stdout


def test_every_alert_is_tested() -> None:
    cases = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]
    raised = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test["exp_alerts"]}
    assert raised == {rule["alert"] for rule in rules() if "alert" in rule}


@needs("promtool")
@pytest.mark.parametrize("scraping", ["prometheus.yaml", "prometheus-secure.yaml"])
def test_promtool_accepts_the_scrape_configuration(tmp_path: Path, scraping: str) -> None:
    for name in (scraping, RULES.name):
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("ca.pem", "prometheus.key"):  # which promtool wants to be there
        (tmp_path / name).touch()
    command = ["promtool", "check", "config", str(tmp_path / scraping)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
