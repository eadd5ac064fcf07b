"""Reads the published routing data that the balancer's benchmark runs on, and makes traces of it.

    python benchmarks/routing_data.py --data DIR --out FOLDER

writes ``gptoss.npz`` (tokens) and ``r1.npz`` (loads alone), which ``expertmesh simulate`` reads. DIR is not part of the
repository: its README names the sources. Files are ``.npz`` or text, xz-compressed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.bounds import combinadic_sets

Ids = NDArray[np.int16]


def read_npz_xz(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of an xz-compressed ``.npz``; pickles are refused."""
    with np.load(io.BytesIO(lzma.open(path).read()), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Chosen experts ``topk_LTK`` of every token, with the sequence and the dataset that each token is of."""

    num_experts: int
    topk_LTK: Ids
    sequence_T: NDArray[np.int64]
    dataset_T: NDArray[np.str_]


def gptoss_tokens(data: Path) -> Tokens:
    """gpt-oss-20b: top-4 of 32, 24 layers, 215,438 generated tokens of 703 sequences."""
    arrays = read_npz_xz(data / "gptoss20b_topk_sets.npz.xz")
    with gzip.open(data / "gptoss20b_sequences.json.gz", "rt") as file:
        rows = json.load(file)["rows"]
    sequence_T = arrays["seq"].astype(np.int64)
    return Tokens(
        num_experts=32,
        topk_LTK=combinadic_sets(32, 4)[arrays["code"].astype(np.int64)],
        sequence_T=sequence_T,
        dataset_T=np.array([row[0] for row in rows])[sequence_T],
    )


def r1_loads(data: Path) -> NDArray[np.float64]:
    """DeepSeek-R1's load per expert [58, 256], rebuilt from published histograms; expert ids carry no structure."""
    return read_npz_xz(data / "deepseek_r1_load_reconstructed.npz.xz")["share_perm"].astype(np.float64)


def tokens_with_loads(load_E: NDArray[np.float64], *, top_k: int, num_tokens: int, seed: int) -> Ids:
    """Synthetic tokens int16 [tokens, K] whose loads are about ``load_E`` and whose experts come in topics.

    Every token is of one of 24 topics that each favour some experts; the K largest of log load + topic + Gumbel noise
    are chosen. Only for sizes and times: co-activation at this scale has not been published.
    """
    rng = np.random.default_rng(seed)
    topic_PE = 1.5 * rng.standard_normal((24, len(load_E)))
    logits_PE = np.log(load_E / load_E.sum() + 1e-9) + topic_PE
    logits_TE = logits_PE[rng.integers(0, 24, num_tokens)] + rng.gumbel(size=(num_tokens, len(load_E)))
    return np.argpartition(-logits_TE, top_k, axis=1)[:, :top_k].astype(np.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the published data")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens = gptoss_tokens(arguments.data)
    # In random order, as the tokens of many requests come in a running batch; both halves have all datasets.
    mixed = np.random.default_rng(0).permutation(len(tokens.sequence_T))
    np.savez_compressed(arguments.out / "gptoss.npz", num_experts=tokens.num_experts, topk=tokens.topk_LTK[:, mixed])
    np.savez_compressed(arguments.out / "r1.npz", num_experts=256, load=r1_loads(arguments.data).astype(np.float32))


if __name__ == "__main__":
    main()
