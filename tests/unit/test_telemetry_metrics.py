"""The table of metrics, its cells, and what /metrics and OTLP show of them."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import Histogram, HistogramDataPoint, Metric, NumberDataPoint, Sum
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry.metrics import Metrics, declarations
from expertmesh.mesh.telemetry.otlp import make_resource
from expertmesh.mesh.telemetry.otlp_metrics import MetricsReader
from expertmesh.mesh.telemetry.prometheus import MetricsEndpoint

VLLM_NAMES = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc time_to_first_token_seconds "
    "inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds "
    "request_prefill_time_seconds request_decode_time_seconds prompt_tokens generation_tokens request_success "
    "num_preemptions prefix_cache_queries prefix_cache_hits request_inference_time_seconds "
    "request_time_per_output_token_seconds request_prompt_tokens request_generation_tokens iteration_tokens_total "
    "spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens"
)


def make_metrics(role: str = "attention") -> Metrics:
    return Metrics(role=role, constant_labels={"role": role, "server_id": f"{role}-0"}, model_name="demo")


@pytest.fixture
def metrics() -> Metrics:
    return make_metrics()


@pytest.fixture
def endpoint(metrics: Metrics) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(metrics, "127.0.0.1", 0)
    yield endpoint
    endpoint.close()


def scrape(address: str, accept: str = "text/plain") -> tuple[str, str]:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers["Content-Type"], response.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_are_unique_and_have_vllms_where_it_has_one() -> None:
    rows = list(declarations())
    assert len({row.name for row in rows}) == len({row.otel for row in rows}) == len(rows)
    assert {row.name for row in rows if row.name.startswith("vllm:")} == {"vllm:" + name for name in VLLM_NAMES.split()}


def test_buckets_rise() -> None:
    for row in declarations():
        assert list(row.buckets) == sorted(set(row.buckets)), row.name
        assert all(0 < bound < float("inf") for bound in row.buckets), row.name


def test_the_scrape_shows_what_was_recorded(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    metrics.num_requests_running.set(3)
    metrics.num_requests_running.add(-1)
    metrics.request_success.add(1, finished_reason="stop")
    metrics.request_success.labels(finished_reason="stop").add(2)
    for value in (0.001, 0.0011, 99999.0):
        metrics.time_to_first_token_seconds.observe(value)
    content_type, text = scrape(endpoint.address)
    assert content_type.startswith("text/plain")
    found = samples(text)
    identity = (("model_name", "demo"), ("role", "attention"), ("server_id", "attention-0"))
    assert found["vllm:num_requests_running", identity] == 2
    assert found["vllm:request_success_total", (("finished_reason", "stop"), *identity)] == 3
    bucket = "vllm:time_to_first_token_seconds_bucket"
    assert found[bucket, (("le", "0.001"), *identity)] == 1
    assert found[bucket, (("le", "0.005"), *identity)] == 2
    assert found[bucket, (("le", "2560.0"), *identity)] == 2
    assert found[bucket, (("le", "+Inf"), *identity)] == 3
    assert found["vllm:time_to_first_token_seconds_count", identity] == 3
    assert found["vllm:time_to_first_token_seconds_sum", identity] == pytest.approx(99999.0021)
    assert found["expertmesh_step_duration_seconds_count", identity[1:]] == 0


def test_openmetrics_for_scrapers_that_ask_for_it(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    metrics.replays.add()
    content_type, text = scrape(endpoint.address, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    names = {sample.name for family in parse_openmetrics(text) for sample in family.samples}  # type: ignore[no-untyped-call]  # has none
    assert {"expertmesh_replays_total", "vllm:num_requests_running"} <= names, "names are the same in both formats"


TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_exemplars_lead_from_a_bucket_to_a_trace(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    metrics.time_to_first_token_seconds.observe(0.003, f"00-{TRACE_ID}-{SPAN_ID}-01")
    metrics.time_to_first_token_seconds.observe(0.3)
    _, text = scrape(endpoint.address, "application/openmetrics-text; version=1.0.0")
    shown = {
        sample.labels["le"]: sample.exemplar
        for family in parse_openmetrics(text)  # type: ignore[no-untyped-call]  # has none
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert list(shown) == ["0.005"]
    assert shown["0.005"].labels == {"trace_id": TRACE_ID, "span_id": SPAN_ID}
    assert shown["0.005"].value == 0.003
    assert TRACE_ID not in scrape(endpoint.address)[1], "the older format has no exemplars"
    (point,) = otlp_histogram(metrics, "gen_ai.server.time_to_first_token")
    (exemplar,) = point.exemplars
    assert (f"{exemplar.trace_id:032x}", f"{exemplar.span_id:016x}") == (TRACE_ID, SPAN_ID)
    encode_metrics(MetricsReader(metrics, make_resource("attention", "attention-0")).read())


def otlp_histogram(metrics: Metrics, name: str) -> list[HistogramDataPoint]:
    data = MetricsReader(metrics, make_resource("attention", "attention-0")).read()
    (metric,) = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == name]
    assert isinstance(metric.data, Histogram)
    return list(metric.data.data_points)


def test_a_labelled_counter_starts_at_zero_where_its_role_is() -> None:
    started = {values["outcome"] for values, _ in make_metrics("balancer").balancer_migrations.series()}
    assert started == {"committed", "aborted", "dropped"}
    assert not make_metrics("router").balancer_migrations.series()


@pytest.mark.parametrize(
    ("role", "shown", "hidden"),
    [
        ("attention", "vllm:num_requests_running", "expertmesh_expert_rank_tokens_total"),
        ("expert", "expertmesh_expert_rank_tokens_total", "vllm:num_requests_running"),
        ("router", "expertmesh_router_requests_inflight", "expertmesh_step_tokens_count"),
        ("balancer", "expertmesh_reconcile_duration_seconds_count", "vllm:num_requests_running"),
    ],
)
def test_a_role_shows_its_own_series_from_the_start(role: str, shown: str, hidden: str) -> None:
    endpoint = MetricsEndpoint(make_metrics(role), "127.0.0.1", 0)
    try:
        names = {name for name, _ in samples(scrape(endpoint.address)[1])}
    finally:
        endpoint.close()
    assert shown in names
    assert hidden not in names


def test_port_in_use_names_the_key(metrics: Metrics, endpoint: MetricsEndpoint) -> None:
    port = int(endpoint.address.rpartition(":")[2])
    with pytest.raises(UserError, match=r"telemetry\.metrics_port.*in use"):
        MetricsEndpoint(metrics, "127.0.0.1", port)


def test_closing_frees_the_port(metrics: Metrics) -> None:
    first = MetricsEndpoint(metrics, "127.0.0.1", 0)
    first.close()
    second = MetricsEndpoint(metrics, "127.0.0.1", int(first.address.rpartition(":")[2]))
    second.close()
    assert second.address == first.address


def test_wrong_labels_are_a_fault_of_the_caller(metrics: Metrics) -> None:
    with pytest.raises(AssertionError, match="finished_reason"):
        metrics.request_success.add(1)
    with pytest.raises(AssertionError, match="takes the labels"):
        metrics.replays.add(1, reason="x")


def test_threads_lose_no_increment(metrics: Metrics) -> None:
    def work() -> None:
        for _ in range(2000):
            metrics.requests_rejected.add(1, reason="queue_full")
            metrics.step_tokens.observe(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.requests_rejected.labels(reason="queue_full").read() == 8000
    assert sum(metrics.step_tokens.labels().read().counts) == 8000


def test_disabled_metrics_take_any_record_and_keep_none() -> None:
    metrics = Metrics(role="attention", enabled=False)
    metrics.num_requests_running.set(1)
    metrics.num_requests_running.labels().add(1)
    metrics.request_success.add(1, finished_reason="stop")
    metrics.request_success.labels(finished_reason="stop").add(1)
    metrics.step_duration_seconds.observe(1)
    metrics.step_duration_seconds.labels().observe(1)
    assert all(not family.series() for _, family, _ in metrics.families())
    assert metrics.step_duration_seconds.labels().read().sum == 0


def read_otlp(metrics: Metrics) -> dict[str, Metric]:
    data = MetricsReader(metrics, make_resource("attention", "attention-0")).read()
    encode_metrics(data)  # what the exporter sends must be encodable
    return {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}


def test_otlp_shows_the_same_cells_under_opentelemetrys_names(metrics: Metrics) -> None:
    metrics.prompt_tokens.add(7)
    metrics.view_number.set(4)
    metrics.e2e_request_latency_seconds.observe(0.6)
    found = read_otlp(metrics)
    tokens = found["expertmesh.prompt_tokens"]
    assert isinstance(tokens.data, Sum)
    assert tokens.data.is_monotonic
    assert tokens.unit == "{token}"
    point = tokens.data.data_points[0]
    assert isinstance(point, NumberDataPoint)
    assert point.value == 7
    assert point.attributes == {
        "expertmesh.role": "attention",
        "expertmesh.instance": "attention-0",
        "gen_ai.request.model": "demo",
    }
    duration = found["gen_ai.server.request.duration"]
    assert isinstance(duration.data, Histogram)
    assert duration.unit == "s"
    histogram = duration.data.data_points[0]
    assert isinstance(histogram, HistogramDataPoint)
    assert (histogram.count, histogram.sum) == (1, 0.6)
    assert histogram.attributes is not None
    assert histogram.attributes["gen_ai.operation.name"] == "text_completion"
    assert "expertmesh.step_duration" in found
    assert "expertmesh.request_success" not in found


@given(st.lists(st.floats(0, 1e4), max_size=50))
def test_every_value_falls_into_the_bucket_that_prometheus_defines(values: list[float]) -> None:
    metrics = make_metrics()
    for value in values:
        metrics.step_duration_seconds.observe(value)
    seen = metrics.step_duration_seconds.labels().read()
    for index, bound in enumerate(seen.bounds):
        assert sum(seen.counts[: index + 1]) == sum(value <= bound for value in values)
    assert sum(seen.counts) == len(values)
