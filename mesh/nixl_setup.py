"""Where NIXL comes from, and what UCX below it may use."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

import psutil
import torch

from expertmesh.mesh.config_security import is_loopback
from expertmesh.mesh.errors import UserError

_PACKAGES = ("nixl_cu13", "nixl_cu12")  # of one release each, for the CUDA that torch has


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What an agent is for, as errors say it: ``key`` asked for it, ``what`` travels, ``where`` it lies."""

    key: str
    what: str
    where: str
    remedy: str


def load_nixl(purpose: Purpose) -> ModuleType:
    """
    Raises:
        UserError: the package is not installed, or cannot be imported.
    """
    cuda = (torch.version.cuda or "").partition(".")[0]
    wanted = [name for name in _PACKAGES if not cuda or name.endswith(cuda)]
    problems = []
    raises = logging.raiseExceptions
    for name in wanted:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            problems.append(str(error))
            continue
        # It configures logging for the whole process: its lines would go to stdout.
        logging.raiseExceptions = raises
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)
        logger.propagate = True
        return module
    raise UserError(
        purpose.key,
        f"{purpose.what} are to travel by NIXL, which cannot be imported "
        f"({'; '.join(problems) or 'none for this CUDA'})",
        f"pip install 'expertmesh[nixl]' (nixl-cu12 where torch has CUDA 12), or {purpose.remedy}",
    )


def ucx_settings(host: str, *, is_on_host: bool) -> str:
    """What UCX may use where the environment (``UCX_TLS``, ``UCX_NET_DEVICES``) does not say it.

    Between GPUs it finds the best way itself; on one machine nothing of it is to be reached from others.
    """
    settings = ["TLS=tcp"] if is_on_host else []
    device = _device_of(host)
    if device and (is_on_host or is_loopback(host)):
        settings.append(f"NET_DEVICES={device}")
    return ",".join(settings)


def _device_of(host: str) -> str:
    """The network device with this address; '' = none or all of them have it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host.strip("[]") for address in addresses):
            return name
    return "lo" if is_loopback(host) else ""
