"""Intervals: coverage, pairing, and the cases where a bootstrap has nothing to draw from."""

import math

import numpy as np
import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.score.bootstrap import Interval, interval, paired_difference


def test_the_interval_of_normal_values_is_about_that_of_theory():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.05 * half)


def test_skewed_values_get_a_skewed_interval():
    found = interval(np.random.default_rng(2).exponential(1.0, 30).tolist())
    # The plain percentile interval gives 1.11, BCa 1.41.
    assert found.high - found.mean > 1.25 * (found.mean - found.low)


def test_more_confidence_is_wider_and_a_seed_gives_one_result():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    wide, narrow = interval(values, confidence=0.99), interval(values, confidence=0.5)
    assert wide.low < narrow.low <= narrow.high < wide.high
    assert interval(values, seed=7) == interval(values, seed=7)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    generator = np.random.default_rng(3)
    found = [interval(generator.normal(0, 1, 40).tolist(), confidence=0.8, draws=500) for _ in range(200)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    # 0.8 with a standard error of 0.03; a bootstrap of 40 values is a little too narrow.
    assert 0.7 < covered < 0.89


def test_pairing_finds_a_difference_that_requests_hide():
    generator = np.random.default_rng(4)
    hard = generator.normal(0, 10, 50)
    a, b = hard + 0.5, hard + generator.normal(0, 0.1, 50)
    found = paired_difference(a.tolist(), b.tolist())
    assert 0.4 < found.low < found.high < 0.6 and found.mean == pytest.approx((a - b).mean())
    assert interval(a.tolist()).low < interval(b.tolist()).high, "unpaired, the two overlap"
    swapped = paired_difference(b.tolist(), a.tolist())
    assert swapped.mean == pytest.approx(-found.mean) and swapped.high < 0


@pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
def test_equal_differences_have_no_width(value):
    assert paired_difference([value + 1] * 5, [1.0] * 5) == Interval(value, value, value)


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0] * 40 + [1.0], [0.0, 1e-300], [0.0] * 500 + [-1.0, 1.0]])
def test_hardly_any_variation_still_gives_finite_ends(values):
    found = interval(values, draws=2000)
    assert min(values) <= found.low <= found.mean <= found.high <= max(values) and found.low < found.high


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least 2 requests"),
        ([1.0], {}, "at least 2 requests"),
        ([1.0, math.nan], {}, "finite"),
        ([1.0, math.inf], {}, "finite"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence must lie between"),
        ([1.0, 2.0], {"draws": 0}, "draws must be at least 1"),
    ],
)
def test_bad_input(values, options, message):
    with pytest.raises(BadInput, match=message):
        interval(values, **options)


def test_scores_of_different_requests_do_not_pair():
    with pytest.raises(BadInput, match="same requests, got 2 and 3"):
        paired_difference([1.0, 0.0], [1.0, 0.0, 1.0])
