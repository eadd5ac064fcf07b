"""Can DeepEP V2 run here, with this model and this placement? What is missing, and what to do about it.

The checks that need no GPU come first, so that a mesh says what is wrong with its configuration wherever it starts.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.errors import UserError

KEY = "dataplane.backend"
INSTEAD = "or set dataplane.backend: nccl"
OLDEST_NCCL = (2, 30, 4)
MAX_SLOTS_PER_RANK = 256
MAX_TOP_K = 32
HIDDEN_MULTIPLE = 256  # the kernels reduce a row in pieces of 16 bytes by 32 lanes
FP8_BLOCK = 128


def check_shape(shape: PlaneShape) -> None:
    """The sizes that DeepEP's kernels are made for.

    Raises:
        UserError: one of them is beyond what it can do.
    """
    if shape.dtype != torch.bfloat16:
        raise UserError("model.dtype", f"{shape.dtype} cannot be combined by DeepEP", f"set it to bfloat16, {INSTEAD}")
    if shape.hidden_size % HIDDEN_MULTIPLE:
        raise UserError(
            KEY, f"deepep needs a hidden size that is a multiple of {HIDDEN_MULTIPLE}, not {shape.hidden_size}",
            "set it to nccl",
        )  # fmt: skip
    if shape.top_k > MAX_TOP_K:
        raise UserError(KEY, f"deepep takes up to {MAX_TOP_K} experts a token, not {shape.top_k}", "set it to nccl")
    if shape.slots_per_rank > MAX_SLOTS_PER_RANK:
        raise UserError(
            "expert.slots_per_server",
            f"{shape.slots_per_rank} slots are more than the {MAX_SLOTS_PER_RANK} that deepep has for a rank",
            f"add expert servers, {INSTEAD}",
        )


def check_installed() -> None:
    """DeepSeek's library is there, in the version with ``ElasticBuffer``; nothing is imported.

    Raises:
        UserError: it is not, or another library has its name.
    """
    spec = importlib.util.find_spec("deep_ep")
    if spec is None:
        raise UserError(
            KEY,
            "deepep needs DeepSeek's DeepEP, and there is no module deep_ep",
            f"build it from https://github.com/deepseek-ai/DeepEP (docs/gpu.md), {INSTEAD}",
        )
    places = spec.submodule_search_locations or []
    if not any(Path(place, "buffers", "elastic.py").is_file() for place in places):
        raise UserError(
            KEY,
            f"the module deep_ep at {', '.join(places) or spec.origin} has no ElasticBuffer: it is DeepEP V1 or "
            "another library (PyPI's deep-ep is one)",
            f"uninstall it and build https://github.com/deepseek-ai/DeepEP 2.1 or newer (docs/gpu.md), {INSTEAD}",
        )


def loaded_nccl(maps: str | None = None) -> Path:
    """The NCCL library that this process has loaded.

    Args:
        maps: contents of /proc/self/maps, for tests.

    Raises:
        UserError: there is none, or more than one.
    """
    text = Path("/proc/self/maps").read_text(encoding="utf-8") if maps is None else maps
    found = sorted({line.split(maxsplit=5)[-1] for line in text.splitlines() if "/libnccl.so" in line})
    if not found:
        raise UserError(KEY, "torch has loaded no NCCL library", f"install torch with CUDA, {INSTEAD}")
    if len(found) > 1:
        raise UserError(
            KEY,
            f"{len(found)} NCCL libraries are loaded: {', '.join(found)}",
            "leave one in the environment and take NCCL out of LD_PRELOAD and LD_LIBRARY_PATH",
        )
    return Path(found[0])


def check_nccl(library: Path, version: tuple[int, int, int] | None = None) -> None:
    """It is new enough for DeepEP's device-side communication.

    Raises:
        UserError: it is not.
    """
    found = nccl_version(library) if version is None else version
    if found < OLDEST_NCCL:
        raise UserError(
            KEY,
            f"deepep needs NCCL {_dotted(OLDEST_NCCL)} or newer, and {library} is {_dotted(found)}",
            f"pip install 'nvidia-nccl-cu13>={_dotted(OLDEST_NCCL)}' into torch's environment, {INSTEAD}",
        )


def nccl_version(library: Path) -> tuple[int, int, int]:
    """Of a library, as it says itself."""
    number = ctypes.c_int()
    ctypes.CDLL(str(library)).ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


def check_peers(own: int, num_visible: int, ranks_on_node: int, can_access: Sequence[bool]) -> None:
    """The GPUs of this node reach each other's memory.

    Args:
        own: this rank's GPU. can_access: for each visible GPU whether ``own`` reaches it; True for itself.

    Raises:
        UserError: too few are visible, or one cannot be reached.
    """
    if num_visible < ranks_on_node:
        raise UserError(
            "CUDA_VISIBLE_DEVICES",
            f"this rank sees {num_visible} GPUs, and {ranks_on_node} ranks of its node exchange tokens through them",
            f"let every rank see all of them, {INSTEAD}",
        )
    unreachable = [str(peer) for peer, reaches in enumerate(can_access) if not reaches]
    if unreachable:
        raise UserError(
            KEY,
            f"GPU {own} has no peer access to GPU {', '.join(unreachable)}",
            "deepep needs NVLink between the GPUs of a node; set it to nccl",
        )


def check_machine(device: torch.device, ranks_on_node: int) -> Path:
    """All of the above that this machine decides; returns the NCCL library in use.

    Raises:
        UserError: naming the first thing that is missing.
    """
    check_installed()
    if not torch.cuda.is_available():
        raise UserError(KEY, "deepep needs CUDA, and torch finds no GPU", "set it to auto or tcp")
    library = loaded_nccl()
    check_nccl(library)
    own, visible = device.index or 0, torch.cuda.device_count()
    reaches = [peer == own or torch.cuda.can_device_access_peer(own, peer) for peer in range(visible)]
    check_peers(own, visible, ranks_on_node, reaches)
    return library
