"""The dispersion test tells Poisson counts from clusters, and from counts that are too even."""

import numpy as np
import pytest

from jointkv.errors import BadInput
from jointkv.theory.dispersion import dispersion_test


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
