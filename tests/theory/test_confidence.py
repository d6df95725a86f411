"""The limit of a mean and the alarm of a rise: their error rates when one looks after every number, and their cost."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jointkv.errors import BadInput, IntegrityError, InvalidPolicy
from jointkv.theory.confidence import (
    FRACTIONS,
    LOG_WEIGHTS,
    STEPS,
    RiseDetector,
    UpperLimit,
    least_audits,
    log_growth,
    log_mixture,
    rise_bets,
    steps_above,
)
from jointkv.theory.trials import DRAWS, INDEPENDENT

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 1 / 3, 1.0]))
CONFIDENCES = st.floats(0.5, 0.999)


def limit_of(shares, confidence=0.95):
    limit = UpperLimit(confidence)
    for share in shares:
        limit.observe(share)
        limit.check_integrity()
    return limit


def log_capital(shares, mean):
    """After each number of each line."""
    return log_mixture(log_growth(mean, shares).cumsum(1))


def spread(chance, trials):
    """Three standard deviations of a measured share."""
    return 3 * math.sqrt(chance * (1 - chance) / trials)


@given(shares=st.lists(SHARES, max_size=40), confidence=CONFIDENCES)
def test_the_limit_lies_between_the_mean_and_1(shares, confidence):
    limit = limit_of(shares, confidence)
    assert limit.count == len(shares)
    assert limit.mean == pytest.approx(sum(shares) / max(1, len(shares)))
    assert limit.mean <= limit.limit <= 1


@given(shares=st.lists(SHARES, min_size=1, max_size=40), mean=st.floats(0.001, 0.999))
def test_it_is_the_formula_of_the_book(shares, mean):
    """Each number is rounded up, and the capital multiplied out bet by bet."""
    capital = 0.0
    for fraction, log_weight in zip(FRACTIONS, LOG_WEIGHTS, strict=True):
        steps = [math.ceil(round(share * STEPS, 6)) / STEPS for share in shares]
        capital += math.exp(log_weight) * math.prod(1 + fraction * (mean - step) / (1 - mean) for step in steps)
    found = log_mixture(limit_of(shares).log_bets(mean))
    assert found == pytest.approx(math.log(capital), abs=1e-9)
    assert found <= log_capital(np.array([shares]), mean)[0, -1] + 1e-9


@given(shares=st.lists(SHARES, min_size=1, max_size=40), at=st.integers(0, 39), larger=SHARES, confidence=CONFIDENCES)
def test_a_larger_number_never_lowers_it(shares, at, larger, confidence):
    at %= len(shares)
    raised = [*shares[:at], max(larger, shares[at]), *shares[at + 1 :]]
    assert limit_of(raised, confidence).limit >= limit_of(shares, confidence).limit


@given(shares=st.lists(SHARES, max_size=40), confidences=st.tuples(CONFIDENCES, CONFIDENCES))
def test_more_confidence_never_lowers_it(shares, confidences):
    low, high = (limit_of(shares, confidence) for confidence in sorted(confidences))
    assert low.limit <= high.limit == low.at(high.confidence).limit


@given(shares=st.lists(SHARES, max_size=40), mean=st.floats(0.001, 0.999))
def test_a_mean_is_excluded_from_the_limit_on(shares, mean):
    limit = limit_of(shares)
    if abs(mean - limit.limit) > 1e-8:
        assert limit.excludes(mean) == (mean > limit.limit)


@given(shares=st.lists(SHARES, min_size=1, max_size=20))
def test_the_order_of_numbers_plays_no_part(shares):
    assert limit_of(shares).limit == limit_of(reversed(shares)).limit


@given(shares=st.lists(SHARES, min_size=1, max_size=40))
def test_zeros_lower_it_and_ones_raise_it(shares):
    start = limit_of(shares).limit
    assert limit_of([*shares, 0.0]).limit <= start <= limit_of([*shares, 1.0]).limit


def test_it_comes_near_the_mean():
    """As `1 / n` without a miss, as `1 / sqrt(n)` down to about 2.6% above the mean with misses."""
    zeros = [limit_of([0.0] * count).limit * count for count in (100, 400, 1600)]
    assert max(zeros) / min(zeros) < 1.05
    excess = {}
    for count in (500, 2000, 8000, 10**8):
        counts = [[0.0, count * 9 // 10], [1.0, count // 10]]
        limit = UpperLimit.from_json({"confidence": 0.95, "sum": count / 10, "counts": counts})
        excess[count] = limit.limit - limit.mean
    assert 1.6 < excess[500] / excess[2000] < 2.6 and 1.6 < excess[2000] / excess[8000] < 2.6
    assert excess[10**8] == pytest.approx(0.026 * 0.1, rel=0.05)


@given(shares=st.lists(SHARES, max_size=40), confidence=CONFIDENCES)
def test_a_saved_limit_is_the_same(shares, confidence):
    limit = limit_of(shares, confidence)
    again = UpperLimit.from_json(json.loads(json.dumps(limit.to_json())))
    assert again.limit == limit.limit and again.to_json() == limit.to_json()
    for each in (limit, again):
        each.observe(0.25)
    assert again.limit == limit.limit and again.mean == limit.mean


def test_memory_does_not_grow():
    limit = UpperLimit(0.95)
    for share in np.random.default_rng(0).random(5000):
        limit.observe(float(share))
    assert limit._counts.shape == (STEPS + 1,) and len(limit.to_json()["counts"]) <= STEPS + 1


@pytest.mark.parametrize(
    "change",
    [
        {"confidence": 1.5},
        {"confidence": None},
        {"counts": [[0.5, -1]]},
        {"counts": [[1.5, 1]]},
        {"counts": [[0.5]]},
        {"counts": 3},
        {"sum": 7.0},
        {"sum": math.nan},
        {"sum": "much"},
    ],
)
def test_what_is_no_saved_limit_is_refused(change):
    saved = limit_of([0.0, 0.5]).to_json()
    with pytest.raises(BadInput):
        UpperLimit.from_json({**saved, **change})
    with pytest.raises(BadInput):
        UpperLimit.from_json({name: value for name, value in saved.items() if name not in change})


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_what_is_no_share_is_refused(share):
    limit, detector = UpperLimit(0.95), RiseDetector(0.02, 100)
    for each in (limit, detector):
        with pytest.raises(BadInput):
            each.observe(share)
    assert limit.count == 0 and detector.to_json() == RiseDetector(0.02, 100).to_json()


@pytest.mark.parametrize("value", [0, 1, -0.5, 2, math.nan])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(InvalidPolicy):
        UpperLimit(value)
    with pytest.raises(InvalidPolicy):
        RiseDetector(value, 100)


@pytest.mark.parametrize("threshold", [0.5, math.inf, math.nan])
def test_a_threshold_that_gives_no_alarm_or_always_one_is_refused(threshold):
    with pytest.raises(InvalidPolicy):
        RiseDetector(0.02, threshold)


def test_rounding_is_up_and_leaves_whole_steps_alone():
    shares = np.array([number / 20 for number in range(21)] + [1 / 3, 1e-7])
    assert steps_above(shares).tolist() == [*range(0, 1001, 50), 334, 1]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_without_a_miss_it_takes_little_more_than_the_least(rate, confidence):
    """At 0.955, say: what the first attempt of a licence at 0.95 asks for. The least counts at 0.95."""
    asked = 1 - 0.9 * (1 - confidence)
    least = least_audits(rate, confidence)
    assert (1 - rate) ** least <= 1 - confidence < (1 - rate) ** (least - 1)
    assert limit_of([0.0] * math.floor(1.2 * least), asked).excludes(rate)
    assert not limit_of([0.0] * (least - 1), confidence).excludes(rate)


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("rate, above", [(0.02, 1.0), (0.02, 1.5), (0.1, 1.0)])
def test_it_is_seldom_wrong_even_for_one_who_stops_when_it_suits(kind, rate, above):
    """Ever below the true mean, at any of 2,000 looks."""
    trials, confidence = 800, 0.95
    mean = min(0.1, above * rate)
    shares = INDEPENDENT[kind](np.random.default_rng(1), mean, (trials, 2000))
    wrong = (log_capital(shares, rate) >= -math.log(1 - confidence)).any(1).mean()
    assert wrong <= 1 - confidence + spread(1 - confidence, trials)


def test_a_limit_for_one_look_would_be_wrong_often():
    """The same trials with the exact binomial limit of 95%, read after every number: the simulation can fail."""
    misses = INDEPENDENT["all blocks or none"](np.random.default_rng(1), 0.02, (800, 2000)).cumsum(1)
    numbers = np.arange(1, 2001)
    most = stats.binom.ppf(0.05, numbers, 0.02) - 1
    assert (misses <= most).any(1).mean() > 0.15


@pytest.mark.parametrize("kind", DRAWS)
def test_means_that_move_are_covered(kind):
    """Bad first and then ever better: an error counts while the average of the means to date is at the rate or above.

    In streaks the mean of the next number, given those before it, moves by itself.
    """
    rate, trials, audits = 0.02, 600, 1500
    rng = np.random.default_rng(2)
    bad = DRAWS[kind](rng, 0.1, (trials, 100))
    good = DRAWS[kind](rng, 0.003, (trials, audits))
    shares = np.concatenate((bad, good), axis=1)
    means = np.concatenate((np.full_like(bad, 0.1), np.full_like(good, 0.003)), axis=1)
    if kind not in INDEPENDENT:
        before = np.concatenate((shares[:, :1], shares[:, :-1]), axis=1)
        means = 0.9 * before + 0.1 * means
        means[:, [0, 100]] = (0.1, 0.003)
    to_date = means.cumsum(1) / np.arange(1, audits + 101)
    wrong = ((log_capital(shares, rate) >= math.log(20)) & (to_date >= rate)).any(1).mean()
    assert np.median((to_date >= rate).sum(1)) > 100
    assert wrong <= 0.05 + spread(0.05, trials)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_a_false_alarm_takes_as_long_as_promised(kind):
    """At the rate itself; each is followed for at most ten times as long, which only shortens the average."""
    rate, threshold, trials = 0.02, 100, 300
    shares = INDEPENDENT[kind](np.random.default_rng(3), rate, (trials, 1000))
    bets, evidence = rise_bets(rate), np.zeros((trials, len(rise_bets(rate))))
    ended = np.full(trials, 1000)
    for step in range(1000):
        evidence = np.maximum(evidence, 0) + np.log1p(bets * (shares[:, step, None] / rate - 1))
        alarm = np.exp(evidence).mean(1) >= threshold
        ended = np.where(alarm & (ended == 1000), step + 1, ended)
    assert ended.mean() >= threshold
    for horizon in (5, 20, 50):
        chance = horizon / threshold
        assert (ended <= horizon).mean() <= chance + spread(chance, trials)


@given(shares=st.lists(SHARES, max_size=30), rate=st.sampled_from(RATES))
def test_the_alarm_grows_with_every_number_and_is_saved(shares, rate):
    low, high = RiseDetector(rate, 1e6), RiseDetector(rate, 1e6)
    for share in shares:
        low.observe(share / 2)
        high.observe(share)
        assert low.evidence <= high.evidence * (1 + 1e-9)
        high.check_integrity()
    again = RiseDetector.from_json(json.loads(json.dumps(high.to_json())))
    assert again.observe(1.0) == high.observe(1.0) and again.evidence == high.evidence


def test_clean_numbers_are_not_saved_up():
    """After 10,000 of them a rise is found as soon as after none."""
    fresh, old = RiseDetector(0.02, 150), RiseDetector(0.02, 150)
    for _ in range(10_000):
        assert not old.observe(0.0)
    delays = [next(number for number in range(1, 100) if each.observe(0.1)) for each in (fresh, old)]
    assert delays[0] <= delays[1] <= delays[0] + 2 <= 10


@pytest.mark.parametrize(
    "change", [{"rate": 0}, {"threshold": "high"}, {"log_evidence": [0.0]}, {"log_evidence": [math.nan] * 6}]
)
def test_what_is_no_saved_detector_is_refused(change):
    saved = RiseDetector(0.02, 100).to_json()
    with pytest.raises(BadInput):
        RiseDetector.from_json({**saved, **change})
    with pytest.raises(BadInput):
        RiseDetector.from_json({name: value for name, value in saved.items() if name not in change})


def test_evidence_that_no_number_leaves_is_found():
    detector = RiseDetector(0.02, 100)
    detector.log_evidence = detector.log_evidence - 10
    with pytest.raises(IntegrityError):
        detector.check_integrity()


@settings(max_examples=30)
@given(rate=st.floats(0.001, 0.999))
def test_bets_on_a_rise_never_ruin(rate):
    bets = rise_bets(rate)
    assert (np.diff(bets) > 0).all() and bets[0] == pytest.approx(rate) and bets[-1] < 1
