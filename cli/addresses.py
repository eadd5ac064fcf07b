"""Where the router and the balancer are: an option, the environment, or the mesh started in this folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from expertmesh.mesh.addresses import is_address, split_addresses
from expertmesh.mesh.errors import UserError

RUN_FILE = Path(".expertmesh") / "run.json"
"""Written by ``expertmesh up`` in its working folder while the mesh runs: ``{"router": ..., "balancer": ...}``."""


def router_address(option: str | None = None) -> str:
    """``host:port`` of a router: ``option``, else EXPERTMESH_ROUTER, else the mesh that ``expertmesh up`` runs here.

    Raises:
        UserError: none of them names one, or it is not ``host:port``.
    """
    return checked_address(*_found("router", option))


def balancer_address(option: str | None = None) -> str:
    """``host:port`` of the balancer, found like ``router_address``; several have commas between them.

    Raises:
        UserError: nothing names one, or it is not ``host:port``.
    """
    return checked_addresses(*_found("balancer", option))


def _found(role: str, option: str | None) -> tuple[str, str]:
    """Where it stands, and what stands there."""
    variable = f"EXPERTMESH_{role.upper()}"
    if option is not None:
        return f"--{role}", option
    if os.environ.get(variable):
        return variable, os.environ[variable]
    return f"{RUN_FILE}: {role}", _from_run_file(role, variable)


def _from_run_file(role: str, variable: str) -> str:
    remedy = f"start a mesh here with `expertmesh up`, or give --{role} HOST:PORT or {variable}"
    try:
        return str(json.loads(RUN_FILE.read_text(encoding="utf-8"))[role])
    except FileNotFoundError:
        raise UserError(f"--{role}", f"no address given and no mesh runs in {Path.cwd()}", remedy) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(RUN_FILE), f"cannot be used ({error!r})", remedy) from None


def checked_address(source: str, address: str) -> str:
    """``address`` when it is ``host:port``.

    Raises:
        UserError: it is not; ``source`` says where it stands.
    """
    if not is_address(address):
        raise UserError(source, f"{address!r} is not an address", "write HOST:PORT, such as 127.0.0.1:50051")
    return address


def checked_addresses(source: str, addresses: str) -> str:
    """``addresses`` when it is ``host:port``, or several of them with commas between.

    Raises:
        UserError: it is not; ``source`` says where it stands.
    """
    for address in split_addresses(addresses) or (addresses,):
        checked_address(source, address)
    return addresses
