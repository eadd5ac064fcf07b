"""Spans of a file of OTLP in JSON, put together to trees in which siblings of one name are one node."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.mesh.errors import UserError, why_unreadable

_ERROR = 2  # OTLP's STATUS_CODE_ERROR


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Times in nanoseconds since the epoch. ``server``: whose span it is."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    server: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Spans of one name below one node, in the order of their starts."""

    spans: Sequence[Span]
    children: Sequence[Node]

    @property
    def name(self) -> str:
        return self.spans[0].name

    @property
    def servers(self) -> list[str]:
        return sorted({span.server for span in self.spans})

    @property
    def start_ns(self) -> int:
        return self.spans[0].start_ns

    @property
    def longest_ns(self) -> int:
        return max(span.end_ns - span.start_ns for span in self.spans)


def read_traces(path: Path) -> dict[str, list[Span]]:
    """Trace id → its spans in the order of their starts; the traces too.

    Raises:
        UserError: the file cannot be read or is no OTLP in JSON.
    """
    spans: list[Span] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    spans.extend(_spans_of(json.loads(line)))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    remedy = "give a file of `expertmesh trace record`"
                    raise UserError(f"{path}:{number}", f"is no OTLP in JSON ({error!r})", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            str(path), f"cannot be read ({why_unreadable(error)})", "give a file of `expertmesh trace record`"
        ) from None
    traces: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        traces.setdefault(span.trace_id, []).append(span)
    return traces


def root_of(spans: Sequence[Span]) -> Span:
    """What a trace is about: its span without a parent, or else the first one (the client has the root then)."""
    return next((span for span in spans if not span.parent_id), spans[0])


def trees(spans: Sequence[Span]) -> list[Node]:
    """The roots of one trace: spans without a parent, or whose parent nobody exported."""
    known = {span.span_id for span in spans}
    below: dict[str, list[Span]] = {}
    for span in spans:
        below.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    return _nodes(below.get("", []), below)


def _nodes(spans: Sequence[Span], below: Mapping[str, Sequence[Span]]) -> list[Node]:
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    nodes = []
    for same in by_name.values():
        children = sorted((child for span in same for child in below.get(span.span_id, ())), key=lambda s: s.start_ns)
        nodes.append(Node(spans=same, children=_nodes(children, below)))
    return nodes


def _spans_of(export: Mapping[str, Any]) -> Iterator[Span]:
    for resource in export["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                attributes = {pair["key"]: _value(pair.get("value", {})) for pair in span.get("attributes", ())}
                yield Span(
                    trace_id=span["traceId"],
                    span_id=span["spanId"],
                    parent_id=span.get("parentSpanId", ""),
                    name=span["name"],
                    server=str(attributes.get("expertmesh.instance", "?")),
                    start_ns=int(span["startTimeUnixNano"]),
                    end_ns=int(span["endTimeUnixNano"]),
                    failed=span.get("status", {}).get("code") == _ERROR,
                    attributes=attributes,
                )


def _value(value: Mapping[str, Any]) -> Any:
    """Integers come as text; lists and maps stay as OTLP has them."""
    for kind, content in value.items():
        return int(content) if kind == "intValue" else content
    return None
