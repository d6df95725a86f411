"""Rarefaction runs the real search, its interval covers fresh batches, and the Poisson model is compared with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import BadInput
from jointkv.theory.rarefaction import LEAST_REQUESTS, arrivals, rarefaction
from jointkv.theory.rate import expected_distinct, predict_poisson
from tests.theory.populations import POPULATIONS, matching, true_ratio


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), requests=st.integers(1, 80), q=st.floats(0, 1))
def test_arrivals_equal_a_plain_search(seed: int, requests: int, q: float) -> None:
    rng = np.random.default_rng(seed)
    present = rng.random((3, requests)) < 0.8
    pairs = (rng.random((3, requests, requests)) < q) & present[:, :, None] & present[:, None, :]
    order = rng.permuted(np.tile(np.arange(requests), (2, 1)), axis=1)
    new_blocks, blocks = arrivals(pairs, present, order)
    for draw, line in enumerate(order):
        residents: list[list[int]] = [[], [], []]
        for step, request in enumerate(line):
            new = 0
            for position, resident in enumerate(residents):
                if present[position, request] and not pairs[position, request, resident].any():
                    resident.append(int(request))
                    new += 1
            assert new_blocks[draw, step] == new and blocks[draw, step] == present[:, request].sum()


def coverage(name: str, sampled: int, size: int) -> tuple[float, float]:
    """Share of fresh batches inside the interval, and mean predicted over true ratio."""
    rng = np.random.default_rng(7)
    covered, relative = [], []
    for run in range(30):
        labels, present = POPULATIONS[name](sampled, rng)
        prediction = rarefaction(matching(labels), present, [size], draws=60, seed=run)[0]
        fresh = [true_ratio(POPULATIONS[name](size, rng)) for _ in range(10)]
        covered += [prediction.low <= ratio <= prediction.high for ratio in fresh]
        relative.append(prediction.ratio / np.mean(fresh))
    return float(np.mean(covered)), float(np.mean(relative))


@pytest.mark.parametrize("name", sorted(POPULATIONS))
@pytest.mark.parametrize(("sampled", "size"), [(32, 32), (32, 12), (64, 64)])
def test_interval_covers_fresh_batches(name: str, sampled: int, size: int) -> None:
    covered, relative = coverage(name, sampled, size)
    assert covered >= 0.85
    assert relative == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("name", sorted(POPULATIONS))
def test_extrapolated_interval_covers_twice_the_sample(name: str) -> None:
    covered, relative = coverage(name, 32, 64)
    assert covered >= 0.85
    assert relative == pytest.approx(1, abs=0.2)


def test_intervals_are_of_use() -> None:
    labels, present = POPULATIONS["near_prefix"](64, np.random.default_rng(0))
    prediction = rarefaction(matching(labels), present, [64])[0]
    assert 1.02 < prediction.high / prediction.low < 1.6


def test_methods_and_limits() -> None:
    alike, apart = np.ones((2, 16, 16), dtype=bool), np.zeros((2, 16, 16), dtype=bool)
    inside, beyond = rarefaction(alike, None, [16, 64])
    assert (inside.method, inside.ratio, inside.distinct) == ("rarefaction", 16, 2)
    assert beyond.method == "extrapolation" and beyond.ratio == pytest.approx(64, rel=0.01)
    inside, beyond = rarefaction(apart, None, [16, 64])
    assert inside.ratio == 1 and beyond.ratio == pytest.approx(1, rel=0.01)
    empty = rarefaction(apart, np.zeros((2, 16), dtype=bool), [8, 32])
    assert [prediction.ratio for prediction in empty] == [1.0, 1.0]


def test_extrapolation_continues_independent_matches() -> None:
    upper = np.triu(np.random.default_rng(0).random((100, 32, 32)) < 0.1, 1)
    prediction = rarefaction(upper | upper.transpose(0, 2, 1), None, [128])[0]
    assert prediction.distinct == pytest.approx(100 * float(expected_distinct(0.1, 128)), rel=0.12)


def test_extrapolation_is_wider_and_between_its_ends() -> None:
    labels, present = POPULATIONS["mixed"](32, np.random.default_rng(3))
    predictions = rarefaction(matching(labels), present, [32, 64, 128])
    widths = [np.log(prediction.high / prediction.low) for prediction in predictions]
    assert widths == sorted(widths)
    distinct = [prediction.distinct for prediction in predictions]
    assert distinct == sorted(distinct) and distinct[2] <= 4 * distinct[0]
    assert all(prediction.low <= prediction.ratio <= prediction.high for prediction in predictions)


def both(pairs: np.ndarray, size: int) -> tuple[float, float]:
    return predict_poisson(pairs, None, size).ratio, rarefaction(pairs, None, [size])[0].ratio


def test_poisson_agrees_on_independent_matches() -> None:
    upper = np.triu(np.random.default_rng(0).random((40, 32, 32)) < 0.08, 1)
    poisson, real = both(upper | upper.transpose(0, 2, 1), 32)
    assert poisson == pytest.approx(real, rel=0.04)


def test_poisson_agrees_on_near_prefix_positions() -> None:
    pairs = np.zeros((10, 16, 16), dtype=bool)
    pairs[:7] = True
    poisson, real = both(pairs, 16)
    assert poisson == pytest.approx(real) == 160 / (7 + 3 * 16)


def test_poisson_underestimates_clusters() -> None:
    # Four equal classes: four distinct blocks for ever, where the Poisson model goes on like ln N.
    poisson, real = both(matching(np.tile(np.arange(64) % 4, (3, 1))), 64)
    assert real == 16 and poisson < 0.75 * real


def test_bad_input_is_refused() -> None:
    few = np.ones((1, LEAST_REQUESTS - 1, LEAST_REQUESTS - 1), dtype=bool)
    with pytest.raises(BadInput, match=f"at least {LEAST_REQUESTS} requests, got {LEAST_REQUESTS - 1}"):
        rarefaction(few, None, [4])
    with pytest.raises(BadInput, match="0 requests"):
        rarefaction(np.ones((1, 9, 9), dtype=bool), None, [0])
