"""``expertmesh trace show``: which traces a file holds, and one of them as a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from expertmesh.cli import admin_client
from expertmesh.cli.admin_client import JsonOption
from expertmesh.cli.trace_spans import Node, Span, read_traces, root_of, trees
from expertmesh.mesh.errors import UserError

_NS_PER_MS = 1e6
LOST = "?"
_ID_DIGITS = 12
_OWN = ("expertmesh.role", "expertmesh.instance")


def show(
    file: Annotated[Path, typer.Argument(help="Of `expertmesh trace record`.")],
    trace: Annotated[str | None, typer.Option(metavar="ID", help="This trace as a tree; its first digits do.")] = None,
    with_span: Annotated[
        str | None,
        typer.Option("--with", metavar="NAME", help="The longest trace that has such a span, such as `replay`."),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Levels of the tree that are shown.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """List the traces of a file, longest first of each kind; with --trace or --with, show one as a tree.

    Spans of one name under one parent share a line: their number, when the first one began and how long the longest
    took, in milliseconds.
    """
    traces = read_traces(file)
    if trace is None and with_span is None:
        _print_list(file, traces, as_json)
        return
    spans = _chosen(traces, trace, with_span)
    roots, began_ns = trees(spans), spans[0].start_ns
    if as_json:
        admin_client.print_json({"trace_id": spans[0].trace_id, "tree": [_as_dict(r, began_ns) for r in roots]})
        return
    table = admin_client.table("at ms", "ms", "span", "on", "")
    for root in roots:
        is_lost = len(roots) > 1 and bool(root.spans[0].parent_id)
        _add_rows(table.add_row, root, began_ns, 1 if is_lost else 0, depth, LOST if is_lost else "")
    console = admin_client.console()
    console.print(f"trace {spans[0].trace_id}: {len(spans)} spans", highlight=False)
    console.print(table)
    if len(roots) > 1:
        console.print(
            f"{LOST}: its parent is not here: a server that was killed, or the client, has it", soft_wrap=True
        )


def _chosen(traces: Mapping[str, list[Span]], trace: str | None, with_span: str | None) -> list[Span]:
    """
    Raises:
        UserError: there is none, or the id names several.
    """
    if trace is not None:
        found = [spans for trace_id, spans in traces.items() if trace_id.startswith(trace.lower())]
        if len(found) != 1:
            remedy = "give one that `expertmesh trace show FILE` lists, or more of its digits"
            raise UserError("--trace", f"{trace} is the id of {len(found)} traces", remedy)
        return found[0]
    # `generate` finds `generate MODEL`.
    named = [spans for spans in traces.values() if any(f"{span.name} ".startswith(f"{with_span} ") for span in spans)]
    if not named:
        names = ", ".join(sorted({span.name for spans in traces.values() for span in spans}))
        raise UserError("--with", f"no trace has a span {with_span}", f"name one of: {names or 'there are no spans'}")
    return max(named, key=_duration_ns)


def _print_list(file: Path, traces: Mapping[str, list[Span]], as_json: bool) -> None:
    by_kind: dict[str, list[list[Span]]] = {}
    for spans in traces.values():
        by_kind.setdefault(root_of(spans).name, []).append(spans)
    for same in by_kind.values():
        same.sort(key=_duration_ns, reverse=True)
    if as_json:
        listed = [
            {
                "trace_id": s[0].trace_id,
                "name": name,
                "ms": _ms(_duration_ns(s)),
                "spans": len(s),
                "servers": _servers(s),
            }
            for name, same in by_kind.items()
            for s in same
        ]
        admin_client.print_json({"traces": listed})
        return
    console = admin_client.console()
    num_spans = sum(len(spans) for spans in traces.values())
    console.print(f"{len(traces)} traces, {num_spans} spans in {file}", highlight=False, soft_wrap=True)
    table = admin_client.table("trace", "longest of its kind", "ms", "spans", "servers", "how many")
    for name, same in by_kind.items():
        first = same[0]
        row = (first[0].trace_id[:_ID_DIGITS], name, f"{_ms(_duration_ns(first)):.1f}", str(len(first)))
        table.add_row(*row, str(len(_servers(first))), str(len(same)))
    console.print(table)
    console.print(f"one of them: expertmesh trace show {file} --trace ID", highlight=False, soft_wrap=True)


def _add_rows(add_row: Any, node: Node, began_ns: int, level: int, depth: int, mark: str = "") -> None:
    first, count = node.spans[0], len(node.spans)
    name = Text("  " * level + mark + node.name + (f" ×{count}" if count > 1 else ""))
    if any(span.failed for span in node.spans):
        name.stylize("red")
    servers = node.servers
    where = servers[0] if len(servers) == 1 else f"{len(servers)} servers"
    notes = _notes(first) if count == 1 else ""
    add_row(
        f"{_ms(node.start_ns - began_ns):.1f}", f"{_ms(node.longest_ns):.1f}", name, where, Text(notes, style="dim")
    )
    if level + 1 < depth:
        for child in node.children:
            _add_rows(add_row, child, began_ns, level + 1, depth)


def _notes(span: Span) -> str:
    """What the span says in the project's own words; lists of experts are for --json."""
    return " ".join(
        f"{key.removeprefix('expertmesh.')}={value}"
        for key, value in span.attributes.items()
        if key.startswith("expertmesh.") and key not in _OWN and isinstance(value, str | int | float)
    )


def _as_dict(node: Node, began_ns: int) -> dict[str, Any]:
    """Of a node that is one span, its attributes too."""
    shown: dict[str, Any] = {
        "name": node.name,
        "count": len(node.spans),
        "servers": node.servers,
        "at_ms": _ms(node.start_ns - began_ns),
        "longest_ms": _ms(node.longest_ns),
        "failed": sum(span.failed for span in node.spans),
    }
    if len(node.spans) == 1:
        shown["attributes"] = dict(node.spans[0].attributes)
    return shown | {"children": [_as_dict(child, began_ns) for child in node.children]}


def _duration_ns(spans: Sequence[Span]) -> int:
    return max(span.end_ns for span in spans) - spans[0].start_ns


def _servers(spans: Sequence[Span]) -> list[str]:
    return sorted({span.server for span in spans})


def _ms(duration_ns: int) -> float:
    return round(duration_ns / _NS_PER_MS, 3)
