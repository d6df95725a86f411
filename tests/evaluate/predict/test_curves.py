"""Rate-distortion curves: predicted on one half, measured on the other, whole and per layer."""

import pytest

from jointkv.evaluate.predict.curves import measured_curves
from tests.evaluate.sharing_requests import BLOCK, requests


class Steps:
    def __init__(self):
        self.lines, self.fractions = [], []

    def start(self, description):
        self.lines.append(description)

    def part(self, fraction):
        self.fractions.append(fraction)


def test_curves_are_measured_on_other_requests(model):
    steps, bounds = Steps(), (0.1, 0.3, 0.6)
    whole, *layers = measured_curves(model, requests(32), bounds, BLOCK, steps)
    assert whole.group is None and [curve.group for curve in layers] == [0, 1, 2, 3]
    assert len(steps.lines) == 3 and steps.fractions[-1] == 1.0
    for curve in (whole, *layers):
        ratios = [point.measured_ratio for point in curve.points]
        assert ratios == sorted(ratios) and [point.bound for point in curve.points] == list(bounds)
        for point in curve.points:
            # Near the errors of all pairs the batch search, which merges groups, finds less than the online one.
            assert point.measured_ratio == pytest.approx(point.rate.ratio, rel=0.25)
            assert point.measured_distortion <= point.bound**2
    assert whole.points[-1].measured_ratio > 1.5 and whole.points[-1].measured_distortion > 0
    # The first layer sees the tokens only, so what it shares is exact.
    assert layers[0].points[0].measured_ratio > 1.5 and layers[0].points[0].measured_distortion < 1e-9
