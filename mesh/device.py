"""What a rank computes on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError

CPU = torch.device("cpu")


LOCAL_RANK_VARIABLES = ("SLURM_LOCALID", "LOCAL_RANK")
"""Where launchers say which of a machine's processes this is."""


def resolve_device(config: MeshConfig, gpu: int | None = None) -> torch.device:
    """The device of this process's rank, by ``device`` in the configuration; a GPU is made the current one.

    Args:
        gpu: which of the GPUs that this process sees; None = by the launcher's number of this process, or the first.

    ``auto`` takes a GPU where one is seen and the ranks can talk from there: the mesh is one ``both`` rank, or the data
    plane is set to one between GPUs.

    Raises:
        UserError: ``cuda`` is asked for, and there is no GPU, or no Triton to compile its kernels; or there are fewer
            GPUs than ``gpu`` says.
    """
    if config.device == "cpu":
        return CPU
    is_alone = config.both_servers == 1 and config.attention.servers == 0 and config.expert.servers == 0
    is_wanted = config.device == "cuda" or is_alone or config.dataplane.backend in ("deepep", "nccl")
    if not is_wanted:
        return CPU
    lacking = _lacking()
    if not lacking:
        device = torch.device("cuda", _gpu_index(gpu))
        torch.cuda.set_device(device)
        return device
    if config.device == "cuda":
        raise UserError("device", f"is cuda, and {lacking}", "install what is missing, or set it to auto or cpu")
    return CPU


@contextlib.contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """What the calling thread copies on a GPU goes through a stream of its own, and is done when this ends."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def begin_behind_steps(device: torch.device) -> None:
    """What the calling thread copies from now on begins behind the steps that have been launched, which may still read
    memory that was made spare since."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))


def _gpu_index(gpu: int | None) -> int:
    visible = torch.cuda.device_count()
    if gpu is None:
        local = next((os.environ[name] for name in LOCAL_RANK_VARIABLES if os.environ.get(name, "").isdigit()), "0")
        return int(local) % visible  # a launcher may show each of its processes one GPU alone
    if gpu >= visible:
        raise UserError(
            "--gpu", f"is {gpu}, and this process sees {visible} GPUs, numbered from 0",
            "start fewer servers on this machine, let them see all of its GPUs, or set device: cpu",
        )  # fmt: skip
    return gpu


def _lacking() -> str:
    """Why this process cannot compute on a GPU, or ''."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU (a driver is missing, or CUDA_VISIBLE_DEVICES hides it)"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles the kernels, is not installed"
    return ""
