"""Errors from cosines equal the errors of drawn vectors; the expectation above a threshold equals the sample mean."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import BadInput
from jointkv.theory.distortion import expected_error, pair_error
from jointkv.theory.exceedance import fit_similarities


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 40), norm=st.floats(0.1, 10), shift=st.floats(-1, 3))
def test_equals_the_error_of_vectors(seed: int, size: int, norm: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal(size) + shift for _ in range(2))
    y *= norm
    length, cosine = np.linalg.norm(x), float(np.clip(unit(x) @ unit(y), -1, 1))
    mean = unit(x) + unit(y)
    served = {
        "resident": y,
        "projection": cosine * length * unit(y),
        "direction": length * unit(mean) if np.linalg.norm(mean) > 1e-6 else None,
    }
    for serving, read in served.items():
        if read is not None:
            expected = np.linalg.norm(x - read) / length
            found = pair_error(cosine, serving, np.linalg.norm(y) / length)
            assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_limits_and_order() -> None:
    cosines = np.linspace(-1, 1, 101)
    for serving in ("projection", "direction", "resident"):
        assert float(pair_error(1.0, serving)) == 0
    assert (np.diff(pair_error(cosines, "direction")) < 0).all()
    # Sharing the mean direction, then the other's direction with own norm; no scale of one direction beats projection.
    positive = cosines[cosines > 0]
    assert (pair_error(positive, "direction") <= pair_error(positive, "resident")).all()
    assert (pair_error(positive, "projection") <= pair_error(positive, "resident", 1.3)).all()
    assert float(pair_error(0.6, "resident", 0.6)) == pytest.approx(float(pair_error(0.6, "projection"))) == 0.8


def test_expectation_equals_the_mean_of_accepted_pairs() -> None:
    sample = np.random.default_rng(0).beta(6, 3, 4000)
    tail = fit_similarities(sample)
    for threshold in (0.5, 0.7):
        for serving in ("projection", "direction", "resident"):
            mean = pair_error(sample[sample >= threshold], serving).mean()
            assert expected_error(tail.exceedance, threshold, serving) == pytest.approx(mean, rel=0.02)


def test_equal_blocks_cost_nothing() -> None:
    def half_equal(cosine: np.ndarray) -> np.ndarray:
        return np.where(cosine <= 0.5, 1.0, 0.5)

    assert expected_error(half_equal, 0.5, "projection") == pytest.approx(math.sqrt(0.75) / 2, rel=1e-2)
    assert expected_error(half_equal, 0.9) == 0
    assert expected_error(half_equal, 0.9, norm_ratio_deviation=0.1) == pytest.approx(0.1)
    assert math.isnan(expected_error(lambda cosine: np.zeros_like(cosine), 0.9))


def test_stricter_thresholds_err_less() -> None:
    tail = fit_similarities(np.random.default_rng(1).normal(0.7, 0.1, 2000))
    errors = [expected_error(tail.exceedance, threshold) for threshold in (0.3, 0.6, 0.8, 0.9, 0.95)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= float(pair_error(0.95))


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="cosines"):
        pair_error(1.5)
    with pytest.raises(BadInput, match="mean_page"):
        pair_error(0.5, "mean_page")
    with pytest.raises(BadInput, match="no cosine"):
        expected_error(lambda cosine: cosine, 2.0)
