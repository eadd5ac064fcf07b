"""What ``expertmesh generate`` may ask of an output as a whole, by options and by keys of a prompt's line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from expertmesh.mesh.errors import UserError, why_unreadable

CONSTRAINT_KEYS: dict[str, type] = {
    "json_schema": dict,
    "json_object": bool,
    "regex": str,
    "grammar": str,
    "choice": list,
}
"""Of a line in ``--prompts``, with the type of each."""


def constraint_options(
    *, json_schema: Path | None, json_object: bool, regex: str | None, grammar: Path | None, choice: list[str] | None
) -> dict[str, Any]:
    """The field of ``SamplingParams`` that the options ask for; empty where they ask for none.

    Raises:
        UserError: there are two, or a file cannot be read.
    """
    given: dict[str, Any] = {
        "--json-schema": json_schema,
        "--json-object": json_object or None,
        "--regex": regex,
        "--grammar": grammar,
        "--choice": choice or None,
    }
    given = {option: value for option, value in given.items() if value is not None}
    if len(given) > 1:
        raise UserError(" and ".join(given), "are given together", "constrain the output by one of them")
    for option, value in given.items():
        content = _read(option, value) if isinstance(value, Path) else value
        key = option.removeprefix("--").replace("-", "_")
        return {key: {"choices": content} if key == "choice" else content}
    return {}


def line_constraint(key: str, value: Any) -> Any:
    """The value of a line's key as ``SamplingParams`` takes it."""
    if key == "json_schema":
        return json.dumps(value, ensure_ascii=False)
    return {"choices": value} if key == "choice" else value


def _read(option: str, path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{option} {path}", f"cannot be read ({why_unreadable(error)})", "give a file in UTF-8"
        ) from None
