"""Axes that every picture shares."""

import pytest

from jointkv.report.figure import grid, kl_axis, log_axis


@pytest.mark.parametrize(("low", "high"), [(0.95, 1.05), (0.9, 1.9), (0.02, 3), (1, 40), (1e-4, 1e4)])
def test_a_logarithmic_axis_has_few_round_ticks_and_one_of_them_is_1(low: float, high: float) -> None:
    _, (axes,) = grid(1, 1, (4, 3))
    log_axis(axes, "y", low, high)
    ticks = [tick for tick in axes.yaxis.get_majorticklocs() if low <= tick <= high]
    assert 1 < len(ticks) <= 10 and any(tick == pytest.approx(1) for tick in ticks)


def test_no_divergence_has_a_place_on_its_axis() -> None:
    _, (axes,) = grid(1, 1, (4, 3))
    kl_axis(axes, 0.0)
    low, high = axes.get_ylim()
    assert low < 0 < high
