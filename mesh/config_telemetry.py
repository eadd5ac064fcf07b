"""What of ``mesh.yaml`` is about traces, metrics and logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from expertmesh.mesh.config_section import Section


class TelemetryConfig(Section):
    otlp_endpoint: str | None = Field(None, description="OTLP/gRPC; unset = OTEL_EXPORTER_OTLP_ENDPOINT, else off")
    trace_sample_ratio: float = Field(1.0, ge=0, le=1, description="of requests that arrive without a trace context")
    control_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="of migrations, view changes and failures, each a trace of its own"
    )
    step_sample_interval_s: float = Field(
        1.0, ge=0, description="at most one step in so many seconds is traced layer by layer"
    )
    slo_ttft_s: float = Field(
        2.0, gt=0, description="a request meets its objective if its first token is there by then"
    )
    slo_tpot_s: float = Field(0.2, gt=0, description="and its other tokens come at this pace, in the mean, or faster")
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(None, ge=0, le=65535, description="/metrics for Prometheus; 0 = any; unset = off")
    metrics_access: Literal["auto", "open"] = Field(
        "auto",
        description="auto = as `tls` and `api` have it: HTTPS, and a key of scope `read` or a certificate of role "
        "`operator`, without keys also `client`; open = anybody who reaches the port, in the clear",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
