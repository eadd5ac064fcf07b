"""The dashboards, each with what it shows."""

from __future__ import annotations

from boards.balancer import BALANCER
from boards.mesh import MESH
from boards.requests import REQUESTS

BOARDS = (REQUESTS, MESH, BALANCER)
