"""``expertmesh``: mounts the sub-commands, imports only the one asked for, turns user errors into exit 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

import expertmesh
from expertmesh.mesh.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SubCommand:
    """Where a sub-command lives; ``target`` names a function or a ``typer.Typer``, imported when it is asked for."""

    target: str
    summary: str
    context_settings: dict[str, Any] = field(default_factory=dict)


SUB_COMMANDS = {
    "up": SubCommand(
        target="expertmesh.cli.up:up",
        summary="Start a local mesh; with -- COMMAND, run it beside the mesh, then stop.",
        context_settings={"allow_interspersed_args": False},
    ),
    "generate": SubCommand(target="expertmesh.cli.generate:generate", summary="Stream text from a router."),
    "balancer": SubCommand(
        target="expertmesh.cli.admin:app",
        summary="Ask the balancer and steer it: status, placement, loads, plan, apply ...",
    ),
    "top": SubCommand(
        target="expertmesh.cli.top:top",
        summary="Watch the mesh: rates, queues, latencies, load by rank, migrations.",
    ),
    "serve": SubCommand(
        target="expertmesh.cli.serve:serve", summary="Run one service: what Slurm, Kubernetes and `up` start."
    ),
    "ranks": SubCommand(
        target="expertmesh.cli.ranks:ranks", summary="Run several ranks of one machine: what a pod with GPUs starts."
    ),
    "slurm": SubCommand(target="expertmesh.cli.slurm:app", summary="Run a mesh as a Slurm job: see docs/slurm.md."),
    "place": SubCommand(target="expertmesh.cli.place:place", summary="Write a placement file from recorded routing."),
    "inspect": SubCommand(
        target="expertmesh.cli.inspect_model:inspect_model",
        summary="Show a model's sizes, what of it fits a GPU, and a dry placement.",
    ),
    "simulate": SubCommand(
        target="expertmesh.cli.simulate:simulate", summary="Compare placements on recorded routing."
    ),
    "plan-deployment": SubCommand(
        target="expertmesh.cli.plan_deployment:plan_deployment",
        summary="Which layout of so many GPUs decodes fastest: attention and experts together or apart.",
    ),
    "keys": SubCommand(target="expertmesh.cli.keys:app", summary="Make, show and revoke API keys."),
    "certs": SubCommand(
        target="expertmesh.cli.certs:certs", summary="Make certificates for a mesh, signed by an authority of its own."
    ),
    "trace": SubCommand(target="expertmesh.cli.trace:app", summary="Record spans into a file, and show them."),
    "bench": SubCommand(target="expertmesh.cli.bench:app", summary="Measure serving, beside transformers."),
}


def build_app(argv: Sequence[str]) -> typer.Typer:
    """The command line for ``argv``: the sub-command that it names is imported, of the others only the summary."""
    app = typer.Typer(
        name="expertmesh",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help="A serving mesh for Mixture-of-Experts language models.")(_root)
    wanted = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, command in SUB_COMMANDS.items():
        target = _load(command.target) if name == wanted else _not_loaded
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, short_help=command.summary)
        else:
            app.command(name, short_help=command.summary, context_settings=command.context_settings)(target)
    return app


def main() -> None:
    """Entry point: a user error is one line on stderr and exit status 2."""
    try:
        build_app(sys.argv[1:])()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line speaks here
        sys.exit(2)
    except KeyboardInterrupt:  # while a sub-command is imported; later it is theirs
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to tell, and the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _load(target: str) -> Callable[..., Any] | typer.Typer:
    module, _, attribute = target.partition(":")
    loaded: Callable[..., Any] | typer.Typer = getattr(importlib.import_module(module), attribute)
    return loaded


def _not_loaded() -> None:
    raise AssertionError("a sub-command that argv does not name was run")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertmesh {expertmesh.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
