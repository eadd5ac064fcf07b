"""Makes ``demo_routing.npz``: which experts the demo model chooses, token by token, in eight domains.

    expertmesh up --attention 1 --experts 2 -- python tests/data/record_routing.py tests/data/demo_routing.npz

For each domain one recording by ``expertmesh balancer record`` while ``expertmesh generate`` continues the prompts of
``demo/prompts.jsonl`` one after the other. The recordings become one trace in which the domains take turns token by
token, as in a running batch of mixed traffic, so that its first and second half come from different prompts of every
domain. ``domain`` and ``domain_names`` say whose a token is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = Path(__file__).resolve().parents[2] / "demo" / "prompts.jsonl"
TOKENS = 1500
"""Of each domain."""
TEMPERATURE = 0.8
TIMEOUT_S = 600.0


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: expertmesh up --attention 1 --experts 2 -- python record_routing.py OUT.npz")
    prompts: dict[str, list[str]] = {}
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        prompts.setdefault(entry["domain"], []).append(entry["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        parts = [record(Path(folder), domain, texts) for domain, texts in prompts.items()]
    topk_LDTK = np.stack([topk_LTK for _, topk_LTK in parts], axis=2)
    num_layers, num_tokens, num_domains, top_k = topk_LDTK.shape
    np.savez_compressed(
        sys.argv[1],
        num_experts=parts[0][0],
        topk=topk_LDTK.reshape(num_layers, num_tokens * num_domains, top_k),
        domain=np.tile(np.arange(num_domains, dtype=np.int16), num_tokens),
        domain_names=np.array(list(prompts)),
    )


def record(folder: Path, domain: str, prompts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``num_experts`` and the first ``TOKENS`` tokens of the prompts and their continuations, [layers, tokens, K]."""
    trace, jobs = folder / f"{domain}.npz", folder / f"{domain}.jsonl"
    length = -(-TOKENS // len(prompts))
    lines = [
        {"prompt": text, "max_tokens": length, "temperature": TEMPERATURE, "seed": number, "ignore_eos": True}
        for number, text in enumerate(prompts)
    ]
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = ["expertmesh", "balancer", "record", "--out", str(trace), "--tokens", str(TOKENS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as recorder:
        assert recorder.stderr is not None
        recorder.stderr.readline()  # "a1 records": from here on no token is missed
        generate = ["expertmesh", "generate", "--prompts", str(jobs), "--json", "--concurrency", "1"]
        subprocess.run(generate, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
        if recorder.wait(TIMEOUT_S):
            sys.exit(f"the recording of {domain} failed")
    with np.load(trace, allow_pickle=False) as arrays:
        return arrays["num_experts"], arrays["topk"]


if __name__ == "__main__":
    main()
