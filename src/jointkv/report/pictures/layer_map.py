"""Which layers share how much, at every bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from jointkv.evaluate.predict.result import Curves
from jointkv.report.figure import heat_map
from jointkv.report.markdown import Columns, number, words
from jointkv.report.pictures.base import Picture
from jointkv.report.pictures.rate_distortion import heading, ratio
from jointkv.theory.curve import CurvePoint

TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
Row = tuple[Curves, int, CurvePoint]
TEXT: Columns[Row] = {"traffic": lambda row: heading(row[0])}
NUMBERS: Columns[Row] = {
    "layer": lambda row: str(row[1]),
    "bound": lambda row: f"{row[2].bound:g}",
    "ratio predicted": lambda row: ratio(row[2].rate),
    "ratio measured": lambda row: number(row[2].measured_ratio, ".2f"),
}


class LayerMap(Picture[Curves]):
    """Heat maps of the ratio, layers downwards and bounds to the right: predicted, and measured beside it."""

    name = "layer_map"
    reads = Curves
    about = "Ratio: blocks before / after in one layer."
    text, numbers = TEXT, NUMBERS

    def rows(self, results: Sequence[Curves]) -> list[Row]:
        curves = [(result, curve.group, curve) for result in results for curve in result.curves]
        layers = [(result, group, curve) for result, group, curve in curves if group is not None]
        return [(result, group, point) for result, group, curve in layers for point in curve.points]

    def draw(self, results: Sequence[Curves]) -> Figure | None:
        rows = [self.rows([result]) for result in results]
        bounds = [sorted({point.bound for _, _, point in found}) for found in rows]
        layers = [sorted({layer for _, layer, _ in found}) for found in rows]
        beside = any(point.measured_ratio is not None for found in rows for _, _, point in found)
        norm = LogNorm(1.0, max(1.1, float(np.nanmax([_both(point) for found in rows for _, _, point in found]))))
        heights = [0.9 + 0.21 * len(found) for found in layers]
        width = (1 + beside) * (0.7 + max(2.4, 0.48 * max(map(len, bounds)))) + 0.9
        figure = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
        panels = figure.subplots(len(rows), 1 + beside, squeeze=False, height_ratios=heights)
        for line, result, found, down, right in zip(panels, results, rows, layers, bounds, strict=True):
            for part, axes in enumerate(line):
                values = np.full((len(down), len(right)), np.nan)
                for _, layer, point in found:
                    values[down.index(layer), right.index(point.bound)] = _both(point)[part]
                names = [str(layer) for layer in down], [f"{bound:g}" for bound in right]
                image = heat_map(axes, values, *names, norm, ".1f")
                axes.set_title(f"{words(result.traffic)}: {('predicted', 'measured (grey: not)')[part]}")
                axes.set_xlabel("bound on the relative error", fontsize=9)
                axes.set_ylabel("layer", fontsize=9)
        bar = figure.colorbar(image, ax=panels, label="ratio of blocks", pad=0.02, aspect=30)
        bar.set_ticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
        bar.ax.set_ylim(norm.vmin, norm.vmax)
        bar.minorticks_off()
        return figure


def _both(point: CurvePoint) -> tuple[float, float]:
    """Predicted and measured ratio, NaN where not measured."""
    return point.rate.ratio, math.nan if point.measured_ratio is None else point.measured_ratio
