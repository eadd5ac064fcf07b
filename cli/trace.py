"""``expertmesh trace``: spans of a mesh in a file, and shown on a terminal, where there is no collector."""

from __future__ import annotations

import typer

from expertmesh.cli import trace_record, trace_show

app = typer.Typer(no_args_is_help=True, help="Record spans into a file, and show them.")
app.command(context_settings={"allow_interspersed_args": False})(trace_record.record)
app.command()(trace_show.show)
