from __future__ import annotations

import sys
from pathlib import Path

import pytest

from expertmesh.cli.placement_plot import plot_placement
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2, mesh_pb2

PLACEMENT = admin_pb2.GetPlacementResponse(
    view_number=3,
    layers=[
        mesh_pb2.LayerPlacement(layer=1, slots=[0, 1, -1, 2, 0, -1]),
        mesh_pb2.LayerPlacement(layer=4, slots=[2, 1, -1, 1, 0, -1]),
    ],
    slot_servers=["e1"] * 3 + ["e2"] * 3,
)
LOADS = admin_pb2.GetLoadsResponse(
    layers=[admin_pb2.LayerLoads(layer=layer, load=[5, 1, 1], tokens=7) for layer in (1, 4)]
)


@pytest.mark.slow
@pytest.mark.parametrize("loads", [LOADS, admin_pb2.GetLoadsResponse()])
def test_a_png_is_drawn_with_and_without_statistics(tmp_path: Path, loads: admin_pb2.GetLoadsResponse) -> None:
    pytest.importorskip("matplotlib", reason="an optional extra")
    plot_placement(tmp_path / "a.png", PLACEMENT, loads)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match="cannot be written"):
        plot_placement(tmp_path, PLACEMENT, loads)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'expertmesh\[plot\]'"):
        plot_placement(tmp_path / "a.png", PLACEMENT, LOADS)


def test_without_a_view_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no view"):
        plot_placement(tmp_path / "a.png", admin_pb2.GetPlacementResponse(), LOADS)
