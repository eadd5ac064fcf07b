"""Writes the Grafana dashboards beside it: ``make dashboards``.

Built with Grafana's own types (grafana-foundation-sdk), so that what is no dashboard does not come out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from panels import BOARDS, Board, Panel  # noqa: E402

SOURCE = models.DataSourceRef(type_val="prometheus", uid="$source")
PANEL_HEIGHT = 8


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


def main() -> None:
    for board in BOARDS:
        (HERE / f"{board.uid}.json").write_text(render(board), encoding="utf-8")


if __name__ == "__main__":
    main()
