"""The router, and what every service has."""

from __future__ import annotations

from expertmesh.mesh.telemetry.instruments import Counter, Gauge
from expertmesh.mesh.telemetry.tables.declared import (
    ROUTER,
    Declared,
    Table,
)


class RouterTable(Table):
    slo_requests = Declared(
        Counter,
        "expertmesh_slo_requests",
        "Requests by whether they met an objective: served (no failure of ours), ttft, tpot, and all of them.",
        labels=("objective", "met"),
        starts_on=ROUTER,
        series=tuple((objective, met) for objective in ("served", "ttft", "tpot", "all") for met in ("true", "false")),
    )
    goodput_tokens = Declared(
        Counter,
        "expertmesh_goodput_tokens",
        "Tokens generated for requests that met all objectives.",
        unit="{token}",
        starts_on=ROUTER,
    )
    router_requests_inflight = Declared(
        Gauge, "expertmesh_router_requests_inflight", "Requests admitted and not finished.", starts_on=ROUTER
    )
    requests_rejected = Declared(
        Counter,
        "expertmesh_requests_rejected",
        "Requests refused.",
        labels=("reason",),
        starts_on=ROUTER,
        series=(("invalid_argument",), ("resource_exhausted",), ("unavailable",), ("deadline_exceeded",)),
    )
    http_requests = Declared(
        Counter,
        "expertmesh_http_requests",
        "Answered by the router's HTTP door, by path and status; 499: the client went away.",
        labels=("route", "code"),
        unit="{request}",
    )
    replays = Declared(
        Counter, "expertmesh_replays", "Requests continued on another attention server.", starts_on=ROUTER
    )
    rpc_internal_errors = Declared(
        Counter,
        "expertmesh_rpc_internal_errors",
        "Calls that ended in INTERNAL by an unforeseen error.",
        labels=("method",),
    )
    build_info = Declared(Gauge, "expertmesh_build_info", "Always 1.", labels=("version", "python"))
