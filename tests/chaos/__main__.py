"""Plays every scenario on real meshes: ``python -m chaos --json FILE`` with tests/ on the path (``make chaos``)."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from chaos.outcome import Outcome, table
from chaos.scenarios import SCENARIOS, play
from chaos.stage import Stage
from chaos.traffic import questions

NUM_TOKENS = 128


def main() -> int:
    """Exit status 1 when a scenario missed a target."""
    options = _options()
    outcomes = asyncio.run(_play_all(options))
    print("\n" + table(outcomes))
    if options.json:
        report = {
            "command": f"make chaos SEED={options.seed}"
            if not options.only
            else "python -m chaos " + " ".join(sys.argv[1:]),
            "scenarios": [json.loads(outcome.as_json()) for outcome in outcomes],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for outcome in outcomes:
        for failure in outcome.failures():
            print(f"{outcome.scenario}: {failure}")
    return int(any(outcome.failures() for outcome in outcomes))


def _options() -> argparse.Namespace:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--seed", type=int, default=1, help="of victims, moments and prompts (default 1)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs of every process there")
    parser.add_argument("--short", action="store_true", help="the versions that the CI plays")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    return parser.parse_args()


async def _play_all(options: argparse.Namespace) -> list[Outcome]:
    chosen = [scenario for scenario in SCENARIOS if not options.only or scenario.name in options.only]
    asked = questions(NUM_TOKENS)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="expertmesh-chaos-") as folder:
        stage = Stage(options.logs or Path(folder))
        try:
            for scenario, following in zip(chosen, [*chosen[1:], None], strict=True):
                outcome = await play(
                    scenario, stage, asked, seed=options.seed, long=not options.short, following=following
                )
                print(outcome.as_json(), flush=True)
                outcomes.append(outcome)
        finally:
            await stage.clear()
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
