"""The statistics of the side-channel measurement, on data whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from jointkv.errors import BadInput
from side_channel_statistics import LEVEL, best_threshold, separation, smallest_detectable_auc

HAZARD = pytest.mark.hazard(
    "Side channels",
    "the measurement calls noise a leak, or misses one",
    "false alarms stay at their stated level, and an AUC of the stated smallest size is found in 8 of 10 runs",
)


def test_known_values() -> None:
    found = separation([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0, 6.0])
    # Of 16 pairs 11 are in order and 2 are ties.
    assert found.auc == pytest.approx(12 / 16)
    assert (found.median_absent, found.median_resident, found.absent, found.resident) == (2.5, 4.0, 4, 4)
    assert found.low < found.auc < found.high


@pytest.mark.parametrize(("shift", "auc"), [(10.0, 1.0), (-10.0, 0.0)])
def test_classes_without_overlap(shift: float, auc: float) -> None:
    values = np.random.default_rng(0).random(20)
    found = separation(values, values + shift)
    assert (found.auc, found.accuracy) == (auc, 1.0)
    assert (found.low, found.high) == pytest.approx((auc, auc))
    assert found.p_value < 1e-6


def test_equal_values_tell_nothing() -> None:
    found = separation([3.0] * 8, [3.0] * 9)
    assert (found.auc, found.p_value, found.accuracy) == (0.5, 1.0, 0.5)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


def test_agrees_with_the_exact_area_of_shifted_normals() -> None:
    rng = np.random.default_rng(1)
    found = separation(rng.normal(size=4000), rng.normal(1.0, size=4000), draws=2)
    assert found.auc == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.01)
    # The best threshold lies half-way between the means.
    assert found.accuracy == pytest.approx(stats.norm.cdf(0.5), abs=0.02)


@HAZARD
def test_interval_covers_the_true_area(record_property: Callable[[str, object], None]) -> None:
    rng, runs, shift = np.random.default_rng(2), 200, 0.5
    true = stats.norm.cdf(shift / np.sqrt(2))
    inside = 0
    for run in range(runs):
        found = separation(rng.normal(size=40), rng.normal(shift, size=40), draws=400, seed=run)
        inside += found.low <= true <= found.high
    record_property("runs", runs)
    assert 0.9 <= inside / runs <= 0.99


@HAZARD
def test_false_alarms_and_power(record_property: Callable[[str, object], None]) -> None:
    rng, runs, trials, tests = np.random.default_rng(3), 400, 100, 8
    shift = stats.norm.ppf(smallest_detectable_auc(trials, trials, tests)) * np.sqrt(2)
    alarms = found = 0
    for _ in range(runs):
        absent, resident = rng.normal(size=(2, trials))
        alarms += stats.mannwhitneyu(absent, resident).pvalue < LEVEL / tests
        found += stats.mannwhitneyu(absent, resident + shift).pvalue < LEVEL / tests
    record_property("runs", runs)
    assert alarms / runs < 2 * LEVEL / tests + 0.005
    assert found / runs == pytest.approx(0.8, abs=0.07)


def test_accuracy_is_not_judged_on_the_trials_that_chose_the_threshold() -> None:
    """On noise a threshold judged on its own trials always looks better than chance."""
    rng = np.random.default_rng(4)
    scores = [separation(rng.random(20), rng.random(20), draws=10).accuracy for _ in range(200)]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.02)


def test_threshold_and_direction() -> None:
    assert best_threshold(np.array([1.0, 2.0]), np.array([4.0, 5.0])) == (3.0, 1.0)
    assert best_threshold(np.array([4.0, 5.0]), np.array([1.0, 2.0])) == (3.0, -1.0)


@pytest.mark.parametrize("absent", [[1.0], [1.0, float("nan")], [[1.0, 2.0], [1.0, 2.0]]])
def test_refuses(absent: list[float]) -> None:
    with pytest.raises(BadInput, match="at least 2 trials"):
        separation(absent, [1.0, 2.0])
