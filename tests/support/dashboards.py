"""The queries of ``deploy/dashboards``: of panels as Grafana would send them, of alerts without their thresholds."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser
import yaml

FOLDER = Path(__file__).parents[2] / "deploy/dashboards"
RULES = FOLDER / "alerts.yaml"
_COMPARISONS = frozenset({"==", "!=", ">", "<", ">=", "<="})


@functools.cache
def generator() -> ModuleType:
    """The program that makes dashboards and rules, as a module; it stands beside what it makes, in no package."""
    spec = importlib.util.spec_from_file_location("generate_dashboards", FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def dashboards() -> dict[str, Any]:
    """File name → contents."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def panel_queries(rate_interval: str) -> dict[str, str]:
    """Dashboard, panel and legend → PromQL."""
    queries = {}
    for name, board in dashboards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                expr = target["expr"].replace("$__rate_interval", rate_interval).replace("$model", ".*")
                assert "$" not in expr, f"{name}: a variable that the tests do not know: {expr}"
                queries[f"{name}: {panel['title']}: {target['legendFormat']}"] = expr
    return queries


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def operands(expr: str) -> list[str]:
    """What an alert compares: it has data while the alert is quiet, too."""
    return _operands(promql_parser.parse(expr))


def _operands(node: Any) -> list[str]:
    if isinstance(node, promql_parser.ParenExpr):
        return _operands(node.expr)
    is_condition = isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _COMPARISONS | {"and", "or"}
    if is_condition:
        return [*_operands(node.lhs), *_operands(node.rhs)]
    return [node.prettify()]
