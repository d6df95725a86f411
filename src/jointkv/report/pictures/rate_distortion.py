"""Rate-distortion curves: what a larger distortion buys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jointkv.evaluate.predict.result import Curves
from jointkv.report.figure import colour, grid, legend_below, log_axis, plain_ticks
from jointkv.report.markdown import Columns, number, words
from jointkv.report.pictures.base import Picture
from jointkv.theory.curve import CurvePoint
from jointkv.theory.rate import RatePrediction

Row = tuple[Curves, CurvePoint]
TEXT: Columns[Row] = {"traffic": lambda row: heading(row[0])}
NUMBERS: Columns[Row] = {
    "bound": lambda row: f"{row[1].bound:g}",
    "ratio predicted": lambda row: ratio(row[1].rate),
    "ratio, Poisson": lambda row: ratio(row[1].poisson),
    "ratio measured": lambda row: number(row[1].measured_ratio, ".2f"),
    "distortion predicted": lambda row: number(row[1].distortion, ".3g"),
    "distortion measured": lambda row: number(row[1].measured_distortion, ".3g"),
}


class RateDistortion(Picture[Curves]):
    """R(D) of all layers together, a panel per traffic: predicted, by the Poisson model, and measured."""

    name = "rate_distortion"
    reads = Curves
    about = (
        "Ratio: blocks before / after, all layers together. Distortion: mean squared relative error over all blocks."
    )
    text, numbers = TEXT, NUMBERS

    def rows(self, results: Sequence[Curves]) -> list[Row]:
        return [
            (each, point) for each in results for curve in each.curves if curve.group is None for point in curve.points
        ]

    def draw(self, results: Sequence[Curves]) -> Figure | None:
        figure, panels = grid(len(results), 3, (5.0, 4.0), "ratio (blocks before / after)")
        for axes, result in zip(panels, results, strict=True):
            _draw_curve(axes, [point for _, point in self.rows([result])])
            axes.set_title(heading(result))
            axes.set_xlabel("distortion (mean squared relative error)")
        legend_below(figure, 3 if len(panels) > 1 else 2)
        return figure


def heading(result: Curves) -> str:
    """Traffic and requests, for titles."""
    return f"{words(result.traffic)}, {result.requests} requests, {result.held_out} held out"


def ratio(found: RatePrediction) -> str:
    """A predicted ratio with its interval."""
    return number(found.ratio, ".2f", found.low, found.high)


def _draw_curve(axes: Axes, points: Sequence[CurvePoint]) -> None:
    distortion = [point.distortion for point in points]
    ratios, low, high = zip(*((each.rate.ratio, each.rate.low, each.rate.high) for each in points), strict=True)
    poisson = [point.poisson.ratio for point in points]
    axes.plot(distortion, ratios, "o-", color=colour(0), markersize=4, label="predicted (rarefaction)")
    axes.fill_between(distortion, low, high, color=colour(0), alpha=0.18, linewidth=0, label="its interval")
    axes.plot(distortion, poisson, "--", color=colour(1), label="predicted (Poisson)")
    known = [(each.measured_distortion, each.measured_ratio) for each in points]
    measured = [(far, found) for far, found in known if far is not None and found is not None]
    if measured:
        look = {"color": colour(3), "markersize": 5, "zorder": 4}
        axes.plot(*zip(*measured, strict=True), "D", label="measured, held out", **look)
    for point in points:
        at, beside = (point.distortion, point.rate.ratio), {"xytext": (4, -10), "textcoords": "offset points"}
        axes.annotate(f"{point.bound:g}", at, **beside, fontsize=7, color="0.3")
    _distortion_axis(axes, [*distortion, *(found for found, _ in measured)])
    drawn = [*ratios, *poisson, *(found for _, found in measured)]
    # An interval that says nothing must not press the curves flat.
    log_axis(axes, "y", min(*drawn, *low), min(2 * max(drawn), max(*drawn, *high)))


def _distortion_axis(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, with a place for 0 if it is among `values`."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        log_axis(axes, "x", min(positive) / 1.4, max(positive) * 1.9)
    elif positive:
        linear_to = 10.0 ** math.floor(math.log10(min(positive)))
        axes.set_xscale("symlog", linthresh=linear_to, linscale=0.4)
        axes.set_xlim(-linear_to / 4, max(positive) * 2)
        plain_ticks(axes.xaxis)
