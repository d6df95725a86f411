"""Match probabilities follow the distribution they were fitted to; dispersion tells Poisson counts from clusters."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from jointkv.errors import BadInput
from jointkv.theory.exceedance import MOST_SAMPLES, dispersion_test, fit_similarities

BETA = stats.beta(6, 3)


def cosines(count: int, seed: int = 0) -> np.ndarray:
    return BETA.rvs(count, random_state=seed)


@pytest.mark.parametrize("chance", [0.9, 0.5, 0.1, 0.02, 0.004])
def test_exceedance_of_a_known_distribution(chance: float) -> None:
    tail = fit_similarities(cosines(4000))
    assert float(tail.exceedance(BETA.isf(chance))) == pytest.approx(chance, rel=0.2, abs=0.01 * (chance > 0.02))


def test_tail_reaches_beyond_the_kernels() -> None:
    # Of 400 cosines 0.4 exceed the threshold on average; the fit is better than counting, and than kernels alone.
    threshold, found = BETA.isf(1e-3), []
    for seed in range(40):
        sample = cosines(400, seed)
        tail = fit_similarities(sample)
        kernels = integrate.trapezoid(tail.density(np.linspace(threshold, 1, 200)), dx=(1 - threshold) / 199)
        found.append((float(tail.exceedance(threshold)), float((sample >= threshold).mean()), float(kernels)))
    fitted, counted, smeared = np.sqrt(np.square(np.subtract(found, 1e-3)).mean(0))
    assert fitted < 0.7 * counted and fitted < 0.3 * smeared
    assert np.mean(found, 0)[0] == pytest.approx(1e-3, rel=0.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(20, 400), spread=st.floats(0.001, 1))
def test_exceedance_is_a_survival_function(seed: int, count: int, spread: float) -> None:
    sample = np.clip(np.random.default_rng(seed).normal(0.8, spread, count), -0.999, 0.999)
    chance = fit_similarities(sample).exceedance(np.linspace(-1, 1.1, 400))
    assert chance[0] == pytest.approx(1, abs=1e-9) and chance[-1] == 0
    assert (np.diff(chance) <= 1e-12).all() and (chance >= 0).all()


def test_density_integrates_to_the_part_that_is_not_equal() -> None:
    sample = np.concatenate([cosines(900), np.ones(100)])
    tail = fit_similarities(sample)
    assert tail.equal == pytest.approx(0.1)
    mass = integrate.quad(lambda cosine: float(tail.density(cosine)), -1, 1, limit=200)[0]
    assert mass == pytest.approx(0.9, abs=1e-3)
    assert float(tail.density(1.01)) == 0
    assert float(tail.exceedance(1.0)) == pytest.approx(0.1)
    # Below the tail, exceedance is the integral of the density.
    above = integrate.quad(lambda cosine: float(tail.density(cosine)), 0.6, 1, limit=200)[0]
    assert float(tail.exceedance(0.6)) == pytest.approx(above + 0.1, abs=1e-3)


def test_two_modes_are_not_blurred() -> None:
    rng = np.random.default_rng(0)
    sample = np.concatenate([rng.normal(0.75, 0.005, 1600), rng.normal(0.995, 0.001, 400)])
    assert float(fit_similarities(sample).exceedance(0.77)) == pytest.approx(0.2, abs=0.02)


def test_nothing_lies_beyond_the_ends() -> None:
    rng = np.random.default_rng(0)
    heavy = replace(fit_similarities(cosines(1000)), shape=0.3, scale=0.2)
    assert float(heavy.exceedance(1 - 1e-7)) < 1e-6 < float(heavy.exceedance(0.99))
    low = np.clip(rng.normal(-0.9, 0.1, 1000), -0.999, 0)
    assert float(fit_similarities(low).exceedance(-0.9999)) > 0.99


def test_intensity_and_subsample() -> None:
    tail = fit_similarities(cosines(3 * MOST_SAMPLES))
    assert len(tail.samples) == MOST_SAMPLES
    assert tail.intensity(0.8, [0, 10, 100]) == pytest.approx(float(tail.exceedance(0.8)) * np.array([0, 10, 100]))


def test_too_few_or_equal_cosines_are_refused() -> None:
    for sample in (cosines(10), np.full(100, 0.5), np.ones(100)):
        with pytest.raises(BadInput, match="different cosines"):
            fit_similarities(sample)


def independent_pairs(q: float, seed: int, positions: int = 8, requests: int = 40) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((positions, requests, requests)) < q, 1)
    return upper | upper.transpose(0, 2, 1)


def test_independent_matches_pass_the_dispersion_test() -> None:
    found = [dispersion_test(independent_pairs(0.03, seed)) for seed in range(100)]
    assert np.mean([test.index for test in found]) == pytest.approx(1, abs=0.06)
    assert np.mean([test.p_value > 0.05 for test in found]) >= 0.85
    assert np.mean([test.p_value > 0.5 for test in found]) == pytest.approx(0.5, abs=0.17)


def test_clusters_are_overdispersed_and_certain_matches_too_even() -> None:
    labels = np.random.default_rng(0).choice(8, 40, p=np.array([13, 1, 1, 1, 1, 1, 1, 1]) / 20)
    clustered = dispersion_test(np.tile(labels[:, None] == labels, (4, 1, 1)))
    assert clustered.index > 2 and clustered.over < 1e-6
    even = dispersion_test(np.ones((4, 40, 40), dtype=bool))
    assert even.index == 0 and even.under < 1e-6 and even.p_value < 1e-6


def test_missing_blocks_do_not_count() -> None:
    pairs = independent_pairs(0.2, 0)
    valid = np.ones(pairs.shape[:2], dtype=bool)
    valid[:, 20:] = False
    assert dispersion_test(pairs, valid).degrees < dispersion_test(pairs).degrees
    with pytest.raises(BadInput, match="nothing to test"):
        dispersion_test(np.zeros((2, 10, 10), dtype=bool))
