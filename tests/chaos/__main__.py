"""Plays every scenario on real meshes: ``python -m chaos --json FILE`` with tests/ on the path (``make chaos``)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from chaos import network
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
    for outcome in outcomes:
        for failure in outcome.failures():
            print(f"{outcome.scenario}: {failure}")
    return int(any(outcome.failures() for outcome in outcomes))


def _write(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """After each scenario, so that what was measured is there if a later one ends it all; what the file has of
    scenarios that this run does not play stays, with the command and the date of its own."""
    played = {outcome.scenario for outcome in outcomes}
    known = json.loads(options.json.read_text(encoding="utf-8"))["scenarios"] if options.json.exists() else []
    made = {"command": f"python -m chaos {' '.join(sys.argv[1:])}", "date": datetime.now(UTC).date().isoformat()}
    found = [entry for entry in known if entry["scenario"] not in played]
    found += [{**json.loads(outcome.as_json()), **made} for outcome in outcomes]
    order = [scenario.name for scenario in SCENARIOS]
    found = sorted(
        (entry for entry in found if entry["scenario"] in order), key=lambda entry: order.index(entry["scenario"])
    )
    options.json.write_text(json.dumps({"scenarios": found}, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report there, beside other scenarios' that it has"
    )
    parser.add_argument("--seed", type=int, default=1, help="of victims, moments and prompts (default 1)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs of every process there")
    parser.add_argument("--minutes", type=float, default=10.0, help="of random kills, and of the soak (default 10)")
    parser.add_argument("--short", action="store_true", help="the versions that the CI plays")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    return parser.parse_args()


async def _play_all(options: argparse.Namespace) -> list[Outcome]:
    chosen = [scenario for scenario in SCENARIOS if not options.only or scenario.name in options.only]
    chosen = [scenario for scenario in chosen if not (options.short and scenario.long_only)]
    if network.APART in os.environ:
        here = chosen
    else:
        here = [scenario for scenario in chosen if not scenario.apart and scenario.why_not() is None]
    outcomes: list[Outcome] = []

    def say(outcome: Outcome) -> None:
        print(outcome.as_json(), flush=True)
        outcomes.append(outcome)
        if options.json:
            _write(options, outcomes)

    with contextlib.ExitStack() as resources:
        folder = options.logs or Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-chaos-")))
        stage = Stage(folder)
        if network.APART in os.environ:
            stage = network.SplitStage(folder, between=resources.enter_context(network.halves()))
        asked = questions(NUM_TOKENS)
        try:
            for scenario, following in zip(here, [*here[1:], None], strict=True) if here else ():
                outcome = await play(
                    scenario,
                    stage,
                    asked,
                    seed=options.seed,
                    long=not options.short,
                    following=following,
                    minutes=options.minutes,
                )
                say(outcome)
        finally:
            await stage.clear()
    for scenario in chosen:
        if scenario in here:
            continue
        if (reason := scenario.why_not()) is not None:
            print(f"{scenario.name} was not played: {reason}", flush=True)
            continue
        say(await network.play_apart(scenario.name, seed=options.seed, long=not options.short))
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
