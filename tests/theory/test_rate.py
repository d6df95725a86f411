"""Expected distinct blocks agree with simulation and limits; when the ratio grows like ln N, and when it does not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import BadInput
from jointkv.theory.rate import (
    expected_distinct,
    left_out_probabilities,
    match_probabilities,
    pair_matrix,
    predict_poisson,
    tree_distinct,
)

PROBABILITY = st.floats(0, 1)


def continuous_distinct(q: np.ndarray | float, blocks: float) -> np.ndarray:
    """The continuous limit of `expected_distinct`."""
    return np.where(np.greater(q, 0), np.log1p(np.multiply(q, blocks)) / np.maximum(q, 1e-300), blocks)


def simulate_online(q: float, blocks: int, runs: int, rng: np.random.Generator) -> float:
    distinct = np.zeros(runs, dtype=int)
    for _ in range(blocks):
        distinct += rng.random(runs) < (1 - q) ** distinct
    return distinct.mean()


def simulate_tree(q: float, blocks: int, rng: np.random.Generator) -> int:
    """Merging halves on drawn pairs of representatives, as Algorithm 1 does."""
    if blocks == 1:
        return 1
    left, right = simulate_tree(q, blocks // 2, rng), simulate_tree(q, blocks // 2, rng)
    matches = rng.random((right, left)) < q
    return left + int((~matches.any(1)).sum())


@pytest.mark.parametrize("q", [0.01, 0.1, 0.5])
def test_online_search_equals_simulation(q: float) -> None:
    simulated = simulate_online(q, 50, 20_000, np.random.default_rng(0))
    assert float(expected_distinct(q, 50)) == pytest.approx(simulated, rel=0.01)


@pytest.mark.parametrize("q", [0.02, 0.1, 0.3])
def test_tree_equals_simulation(q: float) -> None:
    rng = np.random.default_rng(1)
    simulated = np.mean([simulate_tree(q, 64, rng) for _ in range(500)])
    assert float(tree_distinct(q, 64)) == pytest.approx(simulated, rel=0.04)


def test_known_values() -> None:
    assert expected_distinct(0.0, 7) == 7 == tree_distinct(0.0, 7)
    assert expected_distinct(1.0, 7) == 1 == tree_distinct(1.0, 7)
    assert expected_distinct(0.25, 2) == tree_distinct(0.25, 2) == 1.75
    # D after two blocks is 1 or 2; the third is new with probability (1-q)^D.
    assert expected_distinct(0.25, 3) == pytest.approx(1.75 + 0.25 * 0.75 + 0.75 * 0.75**2)
    assert expected_distinct(0.25, 0) == 0 and expected_distinct(0.25, 2.5) == pytest.approx(
        (1.75 + expected_distinct(0.25, 3)) / 2
    )


@pytest.mark.parametrize("q", [1e-4, 1e-3, 1e-2])
def test_continuous_limit(q: float) -> None:
    assert float(continuous_distinct(q, 1000)) == pytest.approx(float(expected_distinct(q, 1000)), rel=0.02)


def test_poisson_form_fails_where_q_is_not_small() -> None:
    assert float(continuous_distinct(1.0, 100)) == pytest.approx(math.log(101)) and expected_distinct(1.0, 100) == 1


@settings(max_examples=60)
@given(q=PROBABILITY, other=PROBABILITY, blocks=st.integers(1, 40))
def test_monotone_and_within_limits(q: float, other: float, blocks: int) -> None:
    low, high = sorted((q, other))
    for distinct in (expected_distinct, tree_distinct):
        value = float(distinct(q, blocks))
        assert 1 - 1e-9 <= value <= blocks + 1e-9
        assert float(distinct(q, blocks + 1)) >= value - 1e-9
    assert float(expected_distinct(high, blocks)) <= float(expected_distinct(low, blocks)) + 1e-9
    assert float(tree_distinct(q, blocks)) <= float(expected_distinct(q, blocks)) + 1e-6


def growth(q: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Ratio of a mixture of `q` at each batch size: all blocks over all expected distinct ones."""
    return np.array([size * len(q) / expected_distinct(q, float(size)).sum() for size in sizes])


def straightness(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def test_ratio_of_one_population_is_nearly_linear_not_logarithmic() -> None:
    sizes = np.array([32, 64, 128, 256])
    ratio = growth(np.array([0.1]), sizes)
    assert ratio == pytest.approx(0.1 * sizes / np.log1p(0.1 * sizes), rel=0.05)
    # Each doubling of N adds more than the last; a logarithm would add the same.
    assert (np.diff(ratio)[1:] > 1.6 * np.diff(ratio)[:-1]).all()
    # Its distinct blocks are what grows like ln N: by ln 2 / -ln(1-q) for each doubling.
    steps, limit = np.diff(sizes / ratio), math.log(2) / -math.log1p(-0.1)
    assert (np.diff(steps) > 0).all() and steps[-1] < limit and steps[-1] == pytest.approx(limit, rel=0.06)


def test_ratio_with_own_blocks_levels_off() -> None:
    ratio = growth(np.array([0.5] * 3 + [0.0]), np.array([256, 512]))
    assert ratio[1] < 4 and ratio[1] / ratio[0] < 1.05


def test_ratio_is_logarithmic_where_match_probabilities_spread_over_magnitudes() -> None:
    # P(q < x) = 1 / (1 + ln(1/x)) by inversion.
    share = (np.arange(20_000) + 0.5) / 20_000
    q = np.exp(1 - 1 / share)
    sizes = 2.0 ** np.arange(7, 21)
    ratio = np.array([size * len(q) / continuous_distinct(q, size).sum() for size in sizes])
    assert straightness(np.log(sizes), ratio) > 0.999 > 0.6 > straightness(sizes, ratio)
    assert np.diff(ratio) == pytest.approx(math.log(2), rel=0.15)


def test_match_probabilities_leave_out_self_and_missing() -> None:
    accepted = np.ones((2, 3, 3), dtype=bool)
    accepted[0, 0, 1] = accepted[1, :, 0] = False
    valid = np.array([[True, True, False], [True, True, True]])
    assert match_probabilities(accepted, valid) == pytest.approx([1 / 2, 4 / 6])


def test_left_out_probabilities_equal_those_of_the_smaller_sample() -> None:
    rng = np.random.default_rng(0)
    pairs, present = pair_matrix(rng.random((5, 7, 7)) < 0.4, rng.random((5, 7)) < 0.7)
    found = left_out_probabilities(pairs, present)
    for request in range(7):
        smaller = np.delete(np.delete(pairs, request, 1), request, 2)
        expected = match_probabilities(smaller, np.delete(present, request, 1))
        assert found[:, request] == pytest.approx(expected)


def independent_pairs(q: float, positions: int, requests: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((positions, requests, requests)) < q, 1)
    return upper | upper.transpose(0, 2, 1)


def test_poisson_prediction_covers_independent_matches() -> None:
    covered = []
    for seed in range(40):
        prediction = predict_poisson(independent_pairs(0.1, 10, 24, seed), None, 24)
        fresh = independent_pairs(0.1, 10, 24, seed + 1000)
        distinct = sum(greedy(pairs) for pairs in fresh)
        covered.append(prediction.low <= 240 / distinct <= prediction.high)
        assert prediction.ratio == pytest.approx(240 / prediction.distinct)
    assert np.mean(covered) >= 0.85


def greedy(pairs: np.ndarray) -> int:
    residents: list[int] = []
    for block in range(len(pairs)):
        if not pairs[block, residents].any():
            residents.append(block)
    return len(residents)


def test_poisson_prediction_scales_to_other_sizes_and_short_requests() -> None:
    pairs = np.stack([np.ones((6, 6), dtype=bool), np.zeros((6, 6), dtype=bool)])
    valid = np.ones((2, 6), dtype=bool)
    valid[1, 3:] = False
    prediction = predict_poisson(pairs, valid, 12)
    assert prediction.distinct == pytest.approx(1 + 6) and prediction.ratio == pytest.approx(18 / 7)
    assert prediction.low <= prediction.ratio <= prediction.high


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match=r"\[0, 1\]"):
        expected_distinct(1.5, 3)
    with pytest.raises(BadInput, match="not negative"):
        tree_distinct(0.5, -1)
    with pytest.raises(BadInput, match="at least 3"):
        predict_poisson(np.ones((1, 2, 2), dtype=bool), None, 2)
    with pytest.raises(BadInput, match="positions, requests, requests"):
        match_probabilities(np.ones((2, 3)))
    with pytest.raises(BadInput, match="valid must be"):
        match_probabilities(np.ones((2, 3, 3)), np.ones((2, 4)))
