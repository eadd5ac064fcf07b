"""What a rank computes on."""

from __future__ import annotations

import importlib.util

import torch

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError

CPU = torch.device("cpu")


def resolve_device(config: MeshConfig) -> torch.device:
    """The device of this process's rank, by ``device`` in the configuration.

    ``auto`` takes a GPU where one is seen and the ranks can talk from there: the mesh is one ``both`` rank, or the data
    plane is set to one between GPUs.

    Raises:
        UserError: ``cuda`` is asked for, and there is no GPU, or no Triton to compile its kernels.
    """
    if config.device == "cpu":
        return CPU
    is_alone = config.both_servers == 1 and config.attention.servers == 0 and config.expert.servers == 0
    is_wanted = config.device == "cuda" or is_alone or config.dataplane.backend in ("deepep", "nccl")
    if not is_wanted:
        return CPU
    lacking = _lacking()
    if not lacking:
        return torch.device("cuda", torch.cuda.current_device())
    if config.device == "cuda":
        raise UserError("device", f"is cuda, and {lacking}", "install what is missing, or set it to auto or cpu")
    return CPU


def _lacking() -> str:
    """Why this process cannot compute on a GPU, or ''."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU (a driver is missing, or CUDA_VISIBLE_DEVICES hides it)"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles the kernels, is not installed"
    return ""
