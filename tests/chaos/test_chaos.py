"""The short versions of all scenarios, strict about tokens, generous about time. ``make chaos`` plays the long ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from chaos.scenarios import SCENARIOS, Scenario, play
from chaos.stage import Stage
from chaos.traffic import Question, questions

pytestmark = pytest.mark.slow

PLAYED = [scenario for scenario in SCENARIOS if not scenario.long_only]
NUM_TOKENS = 64
SEED = 1
SLACK = 10.0
"""Bounds on time are so much wider than in the table: other work may share the two cores of a test machine."""


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions(NUM_TOKENS)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("chaos"))
    yield made
    asyncio.run(made.clear())


@pytest.mark.parametrize(
    ("scenario", "following"),
    list(zip(PLAYED, [*PLAYED[1:], None], strict=True)),
    ids=[scenario.name for scenario in PLAYED],
)
async def test_nothing_is_lost(
    stage: Stage, asked: list[Question], scenario: Scenario, following: Scenario | None
) -> None:
    reason = scenario.why_not()
    if reason is not None:
        print(f"\n{scenario.name} was not played: {reason}")
        pytest.skip(reason)
    outcome = await play(scenario, stage, asked, seed=SEED, long=False, following=following)
    print(f"\n{outcome.as_json()}")
    assert not outcome.failures(slack=SLACK)
