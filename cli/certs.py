"""``expertmesh certs``: an authority and certificates for a mesh on one machine or for trying things out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.mesh.access import CLIENT, OPERATOR, SERVICE_ROLES
from expertmesh.mesh.config_security import TlsConfig
from expertmesh.mesh.errors import UserError

OPENSSL_TIMEOUT_S = 30
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_ROLES = (*sorted(SERVICE_ROLES), OPERATOR, CLIENT)


def certs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets ca.pem, ca.key and ID.pem, ID.key of each.")],
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", help="ROLE, or ROLE-NAME for that server alone; repeatable. Unset = each role."),
    ] = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="A further DNS name or IP address of each; repeatable.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long they are valid.")] = 30,
    domain: Annotated[str, typer.Option(help="tls.domain of the mesh.")] = TlsConfig().domain,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Make certificates that name roles, with the openssl command. An authority that is in FOLDER signs them.

    The authority's key lies unprotected in FOLDER: for production take the one that you have (docs/security.md).
    """
    os.umask(0o077)
    made = make_certificates(folder, ids or _ROLES, hosts=hosts or (), days=days, domain=domain)
    if as_json:
        typer.echo(json.dumps({"ca_file": str(folder / "ca.pem"), "certificates": [str(path) for path in made]}))
    else:
        typer.echo("\n".join(map(str, made)))


def make_certificates(
    folder: Path, ids: Sequence[str], *, hosts: Sequence[str] = (), days: int = 30, domain: str = TlsConfig().domain
) -> list[Path]:
    """The certificates' files. ``ids``: ``ROLE`` for every server of it, ``ROLE-NAME`` for one.

    Raises:
        UserError: there is no openssl, an id begins with no role, or openssl refuses something.
    """
    if shutil.which("openssl") is None:
        raise UserError("openssl", "the command is not installed", "install it, or use an authority that you have")
    folder = folder.resolve()
    names = {server_id: _dns_names(server_id, domain) for server_id in ids}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ca.pem").exists():
        ca = ("-keyout", "ca.key", "-out", "ca.pem", "-days", str(days), "-subj", "/CN=expertmesh authority")
        _openssl(folder, "req", "-x509", *_NEW_KEY, *ca)
    return [_sign(folder, server_id, (*names[server_id], *map(_host_name, hosts)), days) for server_id in ids]


def _dns_names(server_id: str, domain: str) -> Sequence[str]:
    role, _, rest = server_id.partition("-")
    if role not in _ROLES:
        raise UserError("--id", f"{server_id!r} begins with no role", f"write ROLE or ROLE-NAME: {', '.join(_ROLES)}")
    of_role = f"DNS:{role}.{domain}"
    return (of_role, f"DNS:{server_id}.{role}.{domain}") if rest else (of_role,)


def _host_name(host: str) -> str:
    return f"{'IP' if host.replace('.', '').isdigit() or ':' in host else 'DNS'}:{host}"


def _sign(folder: Path, server_id: str, names: Sequence[str], days: int) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        extensions, request = Path(scratch, "extensions"), Path(scratch, "request")
        extensions.write_text(f"subjectAltName={','.join(names)}\nextendedKeyUsage=serverAuth,clientAuth\n")
        made = Path(scratch, "made")
        _openssl(
            folder, "req", *_NEW_KEY, "-keyout", f"{server_id}.key", "-out", str(request), "-subj", f"/CN={server_id}"
        )
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days))
        _openssl(folder, "x509", "-req", "-in", str(request), "-extfile", str(extensions), "-out", str(made), *signing)
        return made.replace(folder / f"{server_id}.pem")


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, timeout=OPENSSL_TIMEOUT_S)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError("openssl", f"{arguments[0]} failed: {said[-1] if said else done.returncode}", "see its message")
