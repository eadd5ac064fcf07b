"""``expertmesh keys``: makes, shows and revokes the API keys of a file that the router and the balancer follow."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from expertmesh.cli import admin_client
from expertmesh.cli.state_dir import write_atomically
from expertmesh.mesh.api_keys import SCOPES, ApiKey, dump_key_file, new_secret, read_key_file
from expertmesh.mesh.config import load_config
from expertmesh.mesh.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Make, show and revoke API keys.")

FileOption = Annotated[
    Path | None, typer.Option("--file", help="The file of keys; unset = api.keys_file of --config, or api-keys.json.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="mesh.yaml that names the file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]

DEFAULT_FILE = Path("api-keys.json")


@app.command()
def create(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Its name in logs and audit events, and its tenant.")],
    scopes: Annotated[list[str] | None, typer.Option("--scope", help="generate, read or admin; repeatable.")] = None,
    days: Annotated[float | None, typer.Option(help="Valid for so long; unset = until revoked.")] = None,
    requests_per_s: Annotated[float | None, typer.Option(help="At each router, at most.")] = None,
    tokens_per_min: Annotated[float | None, typer.Option(help="Prompt and generated; at each router.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="A new secret for an ID that there is.")] = False,
    file: FileOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it: this once, since only its hash is stored."""
    unknown = [scope for scope in scopes or () if scope not in SCOPES]
    if unknown:
        raise UserError("--scope", f"{unknown[0]!r} is none", f"give {', '.join(SCOPES)}")
    if days is not None and not 0 < days < 36500:
        raise UserError("--days", f"is {days:g}", "give a number of days above 0")
    now = datetime.now(UTC).replace(microsecond=0)
    key, sha256 = new_secret(key_id)
    try:
        entry = ApiKey(
            id=key_id,
            sha256=sha256,
            scopes=tuple(scopes or ("generate",)),
            created=now,
            expires=None if days is None else now + timedelta(days=days),
            requests_per_s=requests_per_s,
            tokens_per_min=tokens_per_min,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "ID" if first["loc"] == ("id",) else f"--{'.'.join(map(str, first['loc'])).replace('_', '-')}"
        remedy = "use a-z, 0-9, - and _, 40 characters at most" if where == "ID" else "give a number above 0"
        raise UserError(where, first["msg"], remedy) from None
    with _changing(file, config) as keys:
        if key_id in keys and not replace:
            raise UserError("ID", f"there is a key {key_id} already", "give --replace to make its secret a new one")
        keys[key_id] = entry
    typer.echo(json.dumps({"id": key_id, "key": key}) if as_json else key)


@app.command("list")
def list_keys(file: FileOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what the file says of its keys."""
    keys = read_key_file(_path(file, config)).values()
    if as_json:
        admin_client.print_json({"keys": [_as_dict(entry) for entry in keys]})
        return
    table = admin_client.table("id", "scopes", "created", "expires", "requests/s", "tokens/min")
    for entry in keys:
        expires = "never" if entry.expires is None else f"{entry.expires:%Y-%m-%d %H:%M}"
        if entry.is_expired(datetime.now(UTC)):
            expires += " (expired)"
        limits = (f"{limit:g}" if limit is not None else "-" for limit in (entry.requests_per_s, entry.tokens_per_min))
        table.add_row(entry.id, ", ".join(entry.scopes), f"{entry.created:%Y-%m-%d %H:%M}", expires, *limits)
    admin_client.console().print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of a key that `list` shows.")],
    file: FileOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a key out of the file: servers refuse it within a second. Streams that run go on to their end."""
    with _changing(file, config) as keys:
        if keys.pop(key_id, None) is None:
            raise UserError("ID", f"there is no key {key_id}", "ask `expertmesh keys list`")
    typer.echo(json.dumps({"revoked": key_id}) if as_json else f"revoked {key_id}")


def _path(file: Path | None, config: Path | None) -> Path:
    if file is not None:
        return file
    return (load_config(config).api.keys_file if config is not None else None) or DEFAULT_FILE


@contextmanager
def _changing(file: Path | None, config: Path | None) -> Iterator[dict[str, ApiKey]]:
    """The keys, to be changed; written back if nothing is raised. Who changes the file at the same time waits."""
    path = _path(file, config)
    try:
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read_key_file(path) if path.exists() else {}
            yield keys
            write_atomically(path, dump_key_file(keys))
    except OSError as error:
        raise UserError(
            str(path), f"cannot be written ({error.strerror})", "name a file in a folder of yours"
        ) from None


def _as_dict(entry: ApiKey) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude={"sha256"})
