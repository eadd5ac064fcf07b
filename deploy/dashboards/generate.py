"""Writes the Grafana dashboards and Prometheus's rules beside it: ``make dashboards``.

Dashboards are built with Grafana's own types (grafana-foundation-sdk), so that what is no dashboard does not come out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import alerts  # noqa: E402
from boards import BOARDS  # noqa: E402
from panels import Board, Panel  # noqa: E402

SOURCE = models.DataSourceRef(type_val="prometheus", uid="$source")
PANEL_HEIGHT = 8
RULES_HEADER = """\
# Rules for Prometheus (rule_files) and, with the same contents, for a PrometheusRule of the operator. Made by
# `make dashboards`: alerts.py is what to change, its Limits where other limits are wanted.
#
# The objective is 99 % of requests that are served and meet telemetry.slo_ttft_s and slo_tpot_s. Its budget burns at
# 14.4 times the rate that it has for 30 days when 2 % of it go in an hour, at 6 times when 5 % go in six hours.
"""


def render(board: Board) -> str:
    """The JSON of a dashboard, as Grafana imports it."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["expertmesh"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(SOURCE)
            .query("label_values(vllm:num_requests_running, model_name)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
        )
    )
    for row in board.rows:
        built = built.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            built = built.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _panel(panel: Panel) -> timeseries.Panel:
    stacking = common_models.StackingMode.NORMAL if panel.stacked else common_models.StackingMode.NONE
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(SOURCE)
        .span(panel.width)
        .height(PANEL_HEIGHT)
        .fill_opacity(20 if panel.stacked else 5)
        .stacking(common.StackingConfig().mode(stacking))
        .min(0)
    )
    for number, query in enumerate(panel.queries):
        built = built.with_target(
            prometheus.Dataquery()
            .expr(query.expr)
            .legend_format(query.legend)
            .exemplar(query.exemplars)
            .range()
            .ref_id(chr(ord("A") + number))
        )
    return built


def render_rules(limits: alerts.Limits) -> str:
    """The YAML of all rules, as Prometheus reads it; the header speaks of the default ``limits``."""
    made = [{"name": group.name, "rules": [_rule(rule) for rule in group.rules]} for group in alerts.groups(limits)]
    return RULES_HEADER + yaml.safe_dump({"groups": made}, sort_keys=False, allow_unicode=True, width=10_000)


def _rule(rule: alerts.Record | alerts.Alert) -> dict[str, Any]:
    if isinstance(rule, alerts.Record):
        return {"record": rule.name, "expr": rule.expr}
    return {
        "alert": rule.name,
        "expr": rule.expr,
        **({"for": alerts.duration(rule.for_s)} if rule.for_s else {}),
        "labels": {"severity": rule.severity},
        "annotations": {"summary": rule.summary, "remedy": rule.remedy},
    }


def main() -> None:
    (HERE / "alerts.yaml").write_text(render_rules(alerts.Limits()), encoding="utf-8")
    for board in BOARDS:
        (HERE / f"{board.uid}.json").write_text(render(board), encoding="utf-8")


if __name__ == "__main__":
    main()
