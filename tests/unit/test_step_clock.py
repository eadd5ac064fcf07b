"""Spans of a step whose exchanges overlap: each belongs to its micro-batch and is there once."""

from __future__ import annotations

import itertools

import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.telemetry import Telemetry, disabled_telemetry
from expertmesh.v1 import mesh_pb2

GO = mesh_pb2.StepGo(num_tokens=[5], traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")
LAYERS = (3, 4)


def test_two_micro_batches_have_spans_of_their_own() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = Telemetry(provider.get_tracer("test"), disabled_telemetry().metrics, tracing=True)
    clock = StepClock(telemetry, has_experts=True)
    clock.start(GO, 0)
    for layer in LAYERS:
        for micro_batch in range(2):
            clock.attention_done()
            clock.sent(micro_batch)
        for micro_batch in range(2):
            clock.dispatched(layer, 1, torch.tensor([1]), micro_batch)
            clock.computed(micro_batch)
        for micro_batch in range(2):
            clock.combined(micro_batch)
    clock.finish(5, {layer: [7] for layer in LAYERS})
    found = {}
    for span in exporter.get_finished_spans():
        if span.name != "step":
            assert span.attributes is not None
            key = span.name, span.attributes["expertmesh.layer"], span.attributes["expertmesh.micro_batch"]
            assert key not in found
            found[key] = span.start_time or 0, span.end_time or 0
    assert set(found) == set(itertools.product(("dispatch", "expert_compute", "combine"), LAYERS, range(2)))
    assert all(start <= end for start, end in found.values())
    for layer in LAYERS:
        assert found["dispatch", layer, 1][0] <= found["dispatch", layer, 0][1], "both are under way at once"
