"""Every metric of the mesh, each declared once, in one of the tables.

Names and buckets under ``vllm:`` are vLLM's (vllm/v1/metrics/loggers.py), so that its dashboards work; OpenTelemetry
names are those of the GenAI semantic conventions where they have one. ``starts_on`` lists the roles on which a metric
is exported as 0 from the start, with labels for each of ``series``: a rate over a counter that appears with its first
value misses that value. Recorded elsewhere it appears with its first value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expertmesh.mesh.telemetry.instruments import NULL, Family
from expertmesh.mesh.telemetry.tables.balancer import BalancerTable
from expertmesh.mesh.telemetry.tables.declared import Declared
from expertmesh.mesh.telemetry.tables.ranks import RankTable
from expertmesh.mesh.telemetry.tables.requests import RequestTable
from expertmesh.mesh.telemetry.tables.router import RouterTable


class Metrics(RequestTable, RankTable, BalancerTable, RouterTable):
    """The instruments: ``.set``/``.add`` on gauges, ``.add`` on counters, ``.observe`` on histograms, each with labels
    as keywords; ``.labels(...)`` binds a series once for a hot path. Thread-safe.

    ``constant_labels`` stand on every series; ``model_name`` on those under ``vllm:`` only.
    """

    def __init__(
        self,
        *,
        role: str = "",
        constant_labels: Mapping[str, str] | None = None,
        model_name: str = "",
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self._constant_labels = dict(constant_labels or {})
        self._model_name = model_name
        for declared in declarations():
            kind: type[Family[Any]] = declared.kind if enabled else NULL[declared.kind]
            family = kind(declared.name, declared.labels, declared.buckets)
            setattr(self, declared.attribute, family)
            if role in declared.starts_on:
                for values in declared.series:
                    family.labels(**dict(zip(declared.labels, values, strict=True)))

    def families(self) -> Iterator[tuple[Declared[Any], Family[Any], dict[str, str]]]:
        """Each declaration with its family and the labels that all its series share."""
        for declared in declarations():
            shared = dict(self._constant_labels)
            if declared.name.startswith("vllm:"):
                shared["model_name"] = self._model_name
            yield declared, getattr(self, declared.attribute), shared


def declarations() -> Iterator[Declared[Any]]:
    """Of all tables, in order."""
    return (row for table in Metrics.__bases__ for row in vars(table).values() if isinstance(row, Declared))
