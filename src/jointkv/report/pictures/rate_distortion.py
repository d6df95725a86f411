"""Rate-distortion curves: what a larger distortion buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.markdown import number, table
from jointkv.report.pictures.base import Picture, grid, legend_below, ratio_axis
from jointkv.report.results import Curve, Curves, Point, Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class RateDistortion(Picture[Curves]):
    """R(D) of all layers together, a panel per traffic: predicted, by the Poisson model, and measured."""

    name = "rate_distortion"
    reads = Curves

    def shows(self, result: Curves) -> bool:
        return result.overall is not None

    def draw(self, results: Sequence[Curves]) -> Figure | None:
        figure, panels = grid(len(results), 3, (5.0, 4.0))
        for axes, result in zip(panels, results, strict=True):
            if result.overall is not None:
                _draw_curve(axes, result.overall)
            axes.set_title(result.heading, fontsize=10)
            axes.set_xlabel("distortion (mean squared relative error)")
        for axes in panels[:: min(3, len(panels))]:
            axes.set_ylabel("ratio (blocks before / after)")
        legend_below(figure, 3 if len(panels) > 1 else 2)
        return figure

    def table(self, results: Sequence[Curves]) -> str:
        lines = [
            _line(result, point)
            for result in results
            for point in (result.overall.points if result.overall is not None else ())
        ]
        return (
            "Ratio: blocks before / after, all layers together. Distortion: mean squared relative error "
            "over all blocks.\n\n" + table(("traffic",), NUMBERS, lines)
        )


NUMBERS = (
    "bound",
    "ratio predicted",
    "ratio, Poisson",
    "ratio measured",
    "distortion predicted",
    "distortion measured",
)


def interval(ratio: Ratio) -> str:
    """`ratio` with the interval, where there is one."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.ratio:.2f}"
    return f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _line(result: Curves, point: Point) -> list[str]:
    return [
        result.heading,
        f"{point.bound:g}",
        interval(point.rate),
        interval(point.poisson),
        number(point.measured_ratio, ".2f"),
        number(point.distortion, ".3g"),
        number(point.measured_distortion, ".3g"),
    ]


def _draw_curve(axes: Axes, curve: Curve) -> None:
    points = curve.points
    distortion = [point.distortion for point in points]
    ratios = [point.rate.ratio for point in points]
    low = [point.rate.low or point.rate.ratio for point in points]
    high = [point.rate.high or point.rate.ratio for point in points]
    poisson = [point.poisson.ratio for point in points]
    axes.plot(distortion, ratios, "o-", color="#1a73e8", markersize=4, label="predicted (rarefaction)")
    axes.fill_between(distortion, low, high, color="#1a73e8", alpha=0.18, linewidth=0, label="its interval")
    axes.plot(distortion, poisson, "--", color="#f29900", label="predicted (Poisson)")
    measured = [
        (point.measured_distortion, point.measured_ratio)
        for point in points
        if point.measured_distortion is not None and point.measured_ratio is not None
    ]
    if measured:
        axes.plot(
            *zip(*measured, strict=True), "D", color="#d93025", markersize=5, label="measured, held out", zorder=4
        )
    for point in points:
        axes.annotate(
            f"{point.bound:g}",
            (point.distortion, point.rate.ratio),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=7,
            color="0.3",
        )
    _distortion_axis(axes, [*distortion, *(found for found, _ in measured)])
    everything = [*low, *high, *poisson, *(found for _, found in measured)]
    # An interval that says nothing must not press the curves flat.
    most = 2 * max(*ratios, *poisson, *(found for _, found in measured))
    ratio_axis(axes, "y", min(everything), min(most, max(everything)))


def _distortion_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, with a place for 0 if it is among `values`."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    if len(positive) == len(values):
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.5, max(positive) * 2)
    else:
        linear_to = 10.0 ** math.floor(math.log10(min(positive)))
        axes.set_xscale("symlog", linthresh=linear_to, linscale=0.4)
        axes.set_xlim(-linear_to / 4, max(positive) * 2)
