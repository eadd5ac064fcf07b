"""How noisy counts are, measured between windows of traffic that nobody changed, or somebody did."""

from __future__ import annotations

import numpy as np
import pytest

from expertmesh.balancer.noise import UNKNOWN, Dispersion, has_drifted
from expertmesh.balancer.policy import Floats, LayerStatistics

HALF_LIFE = 4000
NUM_EXPERTS = 32
TOP_K = 4


class Traffic:
    """Requests of ``length`` tokens that all choose the same experts; counts decayed as the balancer's."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._rng = np.random.default_rng(7)
        self._load_E: Floats = np.zeros(NUM_EXPERTS)
        self._tokens = 0.0
        self.seen = 0.0

    def window(self, weight_E: Floats, requests: int) -> LayerStatistics:
        share_E = weight_E / weight_E.sum()
        fresh_E = np.zeros(NUM_EXPERTS)
        for _ in range(requests):
            chosen = self._rng.choice(NUM_EXPERTS, TOP_K, replace=False, p=share_E)
            fresh_E[chosen] += self._length
        tokens = requests * self._length
        kept = 0.5 ** (tokens / HALF_LIFE)
        self._load_E = kept * self._load_E + fresh_E
        self._tokens = kept * self._tokens + tokens
        self.seen += tokens
        return LayerStatistics(tokens=self._tokens, load_E=self._load_E.copy(), coactivation_EE=None)


def measured(length: int, weights: list[Floats]) -> float:
    traffic, dispersion = Traffic(length), Dispersion()
    for weight_E in weights:
        dispersion.observe(traffic.window(weight_E, 2000 // length), traffic.seen)
    return dispersion.value


def test_before_windows_were_compared_it_is_a_guess() -> None:
    assert Dispersion().value == UNKNOWN
    assert measured(1, [np.ones(NUM_EXPERTS)] * 2) == UNKNOWN


@pytest.mark.parametrize("length", [1, 10, 40])
def test_it_is_the_length_of_requests_whose_tokens_choose_alike(length: int) -> None:
    weight_E = (1 + np.arange(NUM_EXPERTS) % 3).astype(np.float64)
    assert measured(length, [weight_E] * 10) == pytest.approx(length, rel=0.6)


def test_one_change_of_traffic_does_not_pass_for_noise() -> None:
    before_E, after_E = np.ones(NUM_EXPERTS), np.where(np.arange(NUM_EXPERTS) < 8, 8.0, 1.0)
    steady = measured(10, [before_E] * 9)
    assert measured(10, [before_E] * 5 + [after_E] * 4) < 2 * steady


def test_windows_without_tokens_say_nothing() -> None:
    traffic, dispersion = Traffic(10), Dispersion()
    snapshot = traffic.window(np.ones(NUM_EXPERTS), 100)
    for _ in range(5):
        dispersion.observe(snapshot, traffic.seen)
    assert dispersion.value == UNKNOWN


@pytest.mark.parametrize("length", [1, 10, 40])
@pytest.mark.parametrize("window", [800, 2000])
def test_only_a_change_of_traffic_is_a_drift(length: int, window: int) -> None:
    traffic, dispersion = Traffic(length), Dispersion()
    before_E, after_E = np.ones(NUM_EXPERTS), np.where(np.arange(NUM_EXPERTS) < 16, 4.0, 1.0)
    for _ in range(10):
        last = traffic.window(before_E, window // length)
        dispersion.observe(last, traffic.seen)
    steady = 0
    for _ in range(20):
        now = traffic.window(before_E, window // length)
        steady += has_drifted(last, now, window, dispersion.value)
        last = now
    assert steady <= 3, "chance passes for a change"
    shifted = traffic.window(after_E, window // length)
    if window >= 50 * length:  # of fewer requests nothing can be told
        assert has_drifted(last, shifted, window, dispersion.value)
    assert not has_drifted(shifted, shifted, 0.0, dispersion.value)
