"""Recorded routing: NumPy ``.npz`` without pickles.

``num_experts`` and either ``topk`` int16 [layers, tokens, K] (-1 = none; optionally ``domain`` int16 [tokens] and
``domain_names``) or ``load`` float32 [layers, experts].
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.counts import count_routing
from expertmesh.mesh.errors import UserError

Ids = NDArray[np.int16]
Floats = NDArray[np.float64]
RECORD_AGAIN = "record it again with `expertmesh balancer record --out TRACE.npz`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Tokens' choices in the order in which they were made, or loads alone.

    Args:
        topk_LTK: chosen experts, -1 = none; None in a load-only trace.
        load_LE: tokens per expert.
        domain_T: what each token belongs to, an index into ``domain_names``.
    """

    num_experts: int
    topk_LTK: Ids | None
    load_LE: Floats
    domain_T: Ids | None = None
    domain_names: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.load_LE)

    @property
    def num_tokens(self) -> int:
        return 0 if self.topk_LTK is None else self.topk_LTK.shape[1]

    def counts(self, tokens: slice) -> tuple[Floats, Floats | None]:
        """Loads [L, E] and pair counts [L, E, E] over some of the tokens; a load-only trace has its loads alone."""
        if self.topk_LTK is None:
            return self.load_LE, None
        counted = [count_routing(topk_TK, self.num_experts) for topk_TK in self.topk_LTK[:, tokens]]
        return np.stack([load_E for load_E, _ in counted]), np.stack([pair_EE for _, pair_EE in counted])


def trace_of_tokens(topk_LTK: Ids, num_experts: int) -> Trace:
    """A trace of tokens' choices."""
    load_LE = np.stack([np.bincount(ids[ids >= 0], minlength=num_experts) for ids in topk_LTK]).astype(np.float64)
    return Trace(num_experts=num_experts, topk_LTK=topk_LTK, load_LE=load_LE)


def read_trace(path: Path) -> Trace:
    """Read and check a trace.

    Raises:
        UserError: no such file, not a trace, or numbers that no routing can have.
    """
    try:
        # Opened here: NumPy leaves a file that is no archive open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "name a trace that was recorded before") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(str(path), f"cannot be read as .npz without pickles ({error})", RECORD_AGAIN) from error
    num_experts = _num_experts(path, arrays)
    if "topk" in arrays:
        topk_LTK = _topk(path, arrays["topk"], num_experts)
        tokens = trace_of_tokens(topk_LTK, num_experts)
        domain_T, names = _domains(path, arrays, topk_LTK.shape[1])
        return Trace(
            num_experts=num_experts,
            topk_LTK=topk_LTK,
            load_LE=tokens.load_LE,
            domain_T=domain_T,
            domain_names=names,
        )
    if "load" in arrays:
        return Trace(num_experts=num_experts, topk_LTK=None, load_LE=_load(path, arrays["load"], num_experts))
    raise UserError(f"{path}: topk, load", "the trace has neither", RECORD_AGAIN)


def _num_experts(path: Path, arrays: dict[str, NDArray[np.generic]]) -> int:
    key = f"{path}: num_experts"
    if "num_experts" not in arrays:
        raise UserError(key, "is missing", RECORD_AGAIN)
    value = arrays["num_experts"]
    if value.size != 1 or not np.issubdtype(value.dtype, np.integer) or not 1 <= int(value.item()) <= 32767:
        raise UserError(key, f"{value} is not one integer from 1 to 32767", RECORD_AGAIN)
    return int(value.item())


def _topk(path: Path, topk: NDArray[np.generic], num_experts: int) -> Ids:
    key = f"{path}: topk"
    if topk.ndim != 3 or not np.issubdtype(topk.dtype, np.integer) or 0 in topk.shape:
        raise UserError(
            key, f"{topk.dtype} {topk.shape} is not int16 [layers, tokens, K], none of them 0", RECORD_AGAIN
        )
    ids = topk.astype(np.int64)
    if ids.min() < -1 or ids.max() >= num_experts:
        layer, token, _ = np.argwhere((ids < -1) | (ids >= num_experts))[0]
        found = f"ids from {ids.min()} to {ids.max()}, first in layer {layer}, token {token}"
        raise UserError(key, f"{found}; the model has experts 0 to {num_experts - 1} (-1 = none)", RECORD_AGAIN)
    in_order = np.sort(ids, axis=2)
    if ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)).any():
        raise UserError(key, "a token chooses the same expert twice", RECORD_AGAIN)
    if (ids < 0).all(axis=(1, 2)).any():
        raise UserError(key, "a layer has no chosen expert at all", RECORD_AGAIN)
    return ids.astype(np.int16)


def _domains(path: Path, arrays: dict[str, NDArray[np.generic]], num_tokens: int) -> tuple[Ids | None, tuple[str, ...]]:
    if "domain" not in arrays:
        return None, ()
    domain, names = arrays["domain"], tuple(str(name) for name in arrays.get("domain_names", np.array([], str)).flat)
    if domain.shape != (num_tokens,) or not np.issubdtype(domain.dtype, np.integer):
        raise UserError(f"{path}: domain", f"{domain.dtype} {domain.shape} is not int16 [{num_tokens}]", RECORD_AGAIN)
    domain_T = domain.astype(np.int16)
    if domain_T.min() < 0 or (names and domain_T.max() >= len(names)):
        raise UserError(f"{path}: domain", f"ids beyond the {len(names)} domain_names", RECORD_AGAIN)
    return domain_T, names


def _load(path: Path, load: NDArray[np.generic], num_experts: int) -> Floats:
    key = f"{path}: load"
    if load.ndim != 2 or load.shape[0] == 0 or load.shape[1] != num_experts or load.dtype.kind not in "fiu":
        raise UserError(key, f"{load.dtype} {load.shape} is not float32 [layers, {num_experts}]", RECORD_AGAIN)
    load_LE = load.astype(np.float64)
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        layer, expert = np.argwhere(~np.isfinite(load_LE) | (load_LE < 0))[0]
        found = f"{load_LE[layer, expert]} at layer {layer}, expert {expert}"
        raise UserError(key, f"{found} is not a load", "loads are finite and not negative: " + RECORD_AGAIN)
    if (load_LE.sum(axis=1) == 0).any():
        raise UserError(key, "a layer has no load at all", RECORD_AGAIN)
    return load_LE
