"""How a metric is declared: a row of a table. Buckets, and the roles on which metrics start at 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, overload

from expertmesh.mesh.telemetry.instruments import Counter, Gauge, Histogram

FamilyT = TypeVar("FamilyT", Gauge, Counter, Histogram)

ATTENTION = ("attention", "both")
EXPERT = ("expert", "both")
RANKS = ("attention", "expert", "both")
ROUTER = ("router",)
BALANCER = ("balancer",)

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
# vLLM's begin at 10 ms; a small model's tokens are faster.
TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
# vLLM's begin at 0.3 s.
REQUEST_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_BUCKETS_S = tuple(mantissa * 10.0**exponent for exponent in range(-5, 1) for mantissa in (1, 2, 5))
REQUEST_TOKEN_BUCKETS = tuple(mantissa * 10**exponent for exponent in range(6) for mantissa in (1, 2, 5))
TOKEN_COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Declared(Generic[FamilyT]):
    """A row of the table: as a class attribute of ``Metrics`` it becomes the instance's instrument."""

    def __init__(
        self,
        kind: type[FamilyT],
        name: str,
        help: str,  # noqa: A002  # Prometheus's word
        *,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = (),
        unit: str = "1",
        otel: str = "",
        starts_on: Sequence[str] = (),
        series: Sequence[Sequence[str]] = (),
    ) -> None:
        self.kind: type[FamilyT] = kind
        self.name = name
        self.help = help
        self.labels = tuple(labels)
        self.buckets = tuple(buckets)
        self.unit = unit
        self.otel = otel or "expertmesh." + name.removeprefix("vllm:").removeprefix("expertmesh_").removesuffix(
            "_seconds"
        )
        self.starts_on = tuple(starts_on)
        self.series = tuple(series) if labels else ((),)

    def __set_name__(self, owner: type[Table], attribute: str) -> None:
        self.attribute = attribute

    @overload
    def __get__(self, table: None, owner: type[Table]) -> Declared[FamilyT]: ...
    @overload
    def __get__(self, table: Table, owner: type[Table]) -> FamilyT: ...
    def __get__(self, table: Table | None, owner: type[Table]) -> Declared[FamilyT] | FamilyT:
        # Reached on the class only: an instance's attribute, set in its constructor, hides a non-data descriptor.
        assert table is None, f"{self.attribute} was not made"
        return self


class Table:
    """Classes whose attributes are declared metrics; ``Metrics`` puts them together."""
