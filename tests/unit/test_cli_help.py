"""Every sub-command says what it and its parameters are for, and prints JSON on request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from expertmesh.cli.main import SUB_COMMANDS, build_app

pytestmark = pytest.mark.slow

RUN_PROCESSES = {"up", "serve", "ranks", "slurm job", "slurm task", "trace record"}
"""They print what they do; `serve` prints JSON in any case."""


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Of a command its own and all commands below it, by what one types."""
    below = getattr(command, "commands", {})
    if not below:
        yield name, command
    for word, sub_command in below.items():
        yield from leaves(sub_command, f"{name} {word}")


def all_commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SUB_COMMANDS:
        app: Any = typer.main.get_command(build_app([name]))
        found |= leaves(app.commands[name], name)
    return found


def test_every_command_explains_itself() -> None:
    commands = all_commands()
    assert len(commands) > 25
    assert not [name for name, command in commands.items() if not command.help]
    unexplained = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not parameter.help and not getattr(parameter, "hidden", False)
    ]
    assert not unexplained


def test_every_command_that_answers_answers_in_json_too() -> None:
    without = {
        name
        for name, command in all_commands().items()
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without == RUN_PROCESSES
