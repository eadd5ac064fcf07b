"""Reading ``mesh.yaml`` as text, and saying what is wrong with it in words of the file."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

_YAML_NAMES = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "empty",
}


class DuplicateKeyError(ValueError):
    """A key stands twice in one mapping."""


class _StrictLoader(yaml.SafeLoader):
    """As ``yaml.safe_load``, but a key that stands twice in a mapping is an error and does not win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise DuplicateKeyError(f"{key.value} stands in line {lines[key.value]} and again in line {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """
    Raises:
        DuplicateKeyError: of two equal keys in a mapping.
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader that refuses more


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """In one line, with the place."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    said = [getattr(error, name, None) for name in ("context", "problem")]
    return f"line {mark.line + 1}, column {mark.column + 1}: {', '.join(text for text in said if text)}"


def describe_kind(value: Any) -> str:
    """What a value is in YAML: 'a list'."""
    return _YAML_NAMES.get(type(value), f"a {type(value).__name__}")


def describe_problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Every wrong key of the file with its value and what it may be; for one that is unknown, the one that it may mean.

    Args:
        model: what the file was validated as.
    """
    return "; ".join(_problem(item, model) for item in error.errors())


def _problem(item: Any, model: type[BaseModel]) -> str:
    loc = item["loc"]
    key = ".".join(str(part) for part in loc) or "(whole)"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(loc[-1]), _keys(model, loc[:-1]), n=1)
        meant = ".".join([*(str(part) for part in loc[:-1]), *close])
        return f"{key}: unknown key" + (f" (did you mean {meant}?)" if close else "")
    if item["type"] == "model_type":
        return f"{key}: is {describe_kind(item['input'])} and should be a mapping of keys (got {item['input']!r})"
    return f"{key}: {message} (got {item['input']!r})" if loc else message


def _keys(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    """Of the section at ``path``."""
    section: Any = model
    for part in path:
        field = section.model_fields.get(part)
        section = getattr(field, "annotation", None)
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)
