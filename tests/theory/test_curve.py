"""Rate-distortion curves: what they must do at the ends, and that they equal a plain search."""

import math

import numpy as np
import pytest

from jointkv.errors import BadInput
from jointkv.theory.curve import SEARCH_DRAWS, rate_distortion

POSITIONS, REQUESTS = 6, 16


def drawn_errors(seed: int = 0, positions: int = POSITIONS) -> np.ndarray:
    """Errors between blocks scattered about four centres: small within a cluster, large between them."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((positions, 4, 32))
    blocks = centre[:, rng.integers(4, size=REQUESTS)] + 0.1 * rng.standard_normal((positions, REQUESTS, 32))
    apart = np.linalg.norm(blocks[:, :, None] - blocks[:, None, :], axis=-1)
    return apart / np.linalg.norm(blocks, axis=-1)[:, :, None]


def test_ends_of_the_curve() -> None:
    points = rate_distortion(drawn_errors(), None, [0.0, 0.3, 1e6]).points
    assert points[0].rate.ratio == 1 and points[0].distortion == 0
    assert points[1].rate.ratio == pytest.approx(REQUESTS / 4, rel=0.3) and 0 < points[1].distortion <= 0.3**2
    assert points[2].rate.ratio == REQUESTS and points[2].poisson.ratio == pytest.approx(REQUESTS)


def test_rate_and_distortion_rise_with_the_bound() -> None:
    points = rate_distortion(drawn_errors(1), None, [0.3, 0.05, 0.1, 0.2, 0.2]).points
    assert [point.bound for point in points] == [0.05, 0.1, 0.2, 0.3]
    ratios, distortions = ([value(p) for p in points] for value in (lambda p: p.rate.ratio, lambda p: p.distortion))
    assert ratios == sorted(ratios) and distortions == sorted(distortions)


def test_distortion_of_one_pair() -> None:
    # Of two blocks that serve each other at 0.1 and 0.3, the later one is served; the other six requests match nothing.
    error = np.full((1, 8, 8), math.inf)
    error[0, 0, 1], error[0, 1, 0] = 0.1, 0.3
    only_one_way, both_ways = rate_distortion(error, None, [0.2, 0.3]).points
    assert 0 < only_one_way.distortion <= 0.1**2 / 8
    assert 0.1**2 / 8 < both_ways.distortion < 0.3**2 / 8
    assert both_ways.rate.distinct == pytest.approx(7) and 7 < only_one_way.rate.distinct < 8


def test_the_closest_resident_serves() -> None:
    # Any of the first eight may serve the last eight; each of those has one at 0.01. The former match nothing.
    error = np.full((1, 16, 16), math.inf)
    error[0, 8:, :8] = 0.2
    error[0, np.arange(8, 16), np.arange(8)] = 0.01
    (point,) = rate_distortion(error, None, [0.2]).points
    served = 16 - point.rate.distinct
    assert 0.01**2 * served / 16 < point.distortion < 0.2**2 * served / 16


def test_only_residents_serve() -> None:
    # Neighbours in a chain serve each other at one error, so that distortion counts the blocks served.
    error = np.full((1, 16, 16), math.inf)
    first = np.arange(15)
    error[0, first, first + 1] = error[0, first + 1, first] = 0.1
    (point,) = rate_distortion(error, None, [0.1], draws=SEARCH_DRAWS).points
    assert point.distortion / 0.1**2 * 16 == pytest.approx(16 - point.rate.distinct)


def test_missing_blocks_are_left_out() -> None:
    error = drawn_errors(2)
    valid = np.ones(error.shape[:2], dtype=bool)
    valid[3:] = False
    short = rate_distortion(error, valid, [0.3]).points[0]
    cut = rate_distortion(error[:3], None, [0.3]).points[0]
    assert short.distortion == pytest.approx(cut.distortion) and short.rate == cut.rate


def test_larger_batches_than_the_sample_are_extrapolated() -> None:
    found = rate_distortion(drawn_errors(1), None, [0.1, 0.3], requests=32, group=1)
    assert found.group == 1
    assert all(point.rate.requests == 32 and point.rate.method == "extrapolation" for point in found.points)
    assert found.points[1].rate.ratio > rate_distortion(drawn_errors(1), None, [0.3]).points[0].rate.ratio


def test_measured_points_stand_beside() -> None:
    curve = rate_distortion(drawn_errors(), None, [0.1, 0.3]).with_measured({0.3: (3.5, 0.01)})
    assert (curve.points[1].measured_ratio, curve.points[1].measured_distortion) == (3.5, 0.01)
    assert curve.points[0].measured_ratio is None
    with pytest.raises(BadInput, match=r"bound 0\.5"):
        curve.with_measured({0.5: (1.0, 0.0)})


def test_bad_bounds_are_refused() -> None:
    for bounds in ([], [-0.1]):
        with pytest.raises(BadInput, match="bounds"):
            rate_distortion(drawn_errors(), None, bounds)
