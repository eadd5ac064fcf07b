"""Writes docs/configuration.md from the configuration's own fields: `make gen` runs it, a test compares the result."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.config_section import Section

INTRODUCTION = """\
# Configuration

One file, `mesh.yaml`, describes a mesh; every service of the mesh reads the same one. It is validated as a whole before
anything starts: an unknown key or a wrong value ends the command with status 2 and the key's name. Every key has a
default under which `expertmesh up` works, so an empty file is a valid one. `deploy/local/mesh.yaml` is an example.

Options of `expertmesh up` (`--model`, `--attention`, `--experts`, `--both`, `--num-slots`, `--dtype`, `--port`) and of
`expertmesh serve` (`--balancer`, `--node`, `--port`) override the file. Secrets are never in it: keys that end in
`_file` name the files that hold them.

This page is generated from `mesh/config*.py` by `make gen`.
"""


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _section("Top level", MeshConfig, "")]
    for name, field in MeshConfig.model_fields.items():
        if (section := _section_type(field)) is not None:
            parts.append(_section(f"`{name}`", section, f"{name}."))
    return "\n".join(parts)


def _section(title: str, section: type[Section], prefix: str) -> str:
    lines = [f"## {title}\n", "| key | type | default | |", "|---|---|---|---|", *_rows(section, prefix)]
    return "\n".join(lines) + "\n"


def _rows(section: type[Section], prefix: str) -> Iterator[str]:
    """Of the section's keys and, below the top level, of the sections in it."""
    for name, field in section.model_fields.items():
        inner = _section_type(field)
        if inner is None:
            cells = [f"`{prefix}{name}`", _type(field), _default(field.default), field.description or ""]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        elif prefix:
            yield from _rows(inner, f"{prefix}{name}.")


def _section_type(field: FieldInfo) -> type[Section] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _type(field: FieldInfo) -> str:
    words = _type_words(field.annotation)
    limits = [_limit(limit) for limit in field.metadata]
    return ", ".join(filter(None, [words, *limits]))


def _type_words(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_words(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_type_words(get_args(annotation)[0])}"
    if annotation is Path:
        return "path"
    return str({int: "integer", float: "number", str: "text", bool: "`true` or `false`"}.get(annotation, annotation))


def _limit(limit: Any) -> str:
    for kind, sign, attribute in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
        if isinstance(limit, kind):
            return f"{sign} {getattr(limit, attribute)}"
    pattern = getattr(limit, "pattern", None)
    return f"matches `{pattern}`" if pattern is not None else ""


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(document(), encoding="utf-8")
