"""Which layers share how much, at every bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jointkv.report.markdown import number, table
from jointkv.report.pictures.base import Picture
from jointkv.report.pictures.rate_distortion import interval
from jointkv.report.results import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERED_BOUNDS = 12
"""With more bounds the cells are too narrow for numbers."""


class LayerMap(Picture[Curves]):
    """Heat maps of the ratio, layers downwards and bounds to the right: predicted, and measured beside it."""

    name = "layer_map"
    reads = Curves

    def shows(self, result: Curves) -> bool:
        return bool(result.layers)

    def draw(self, results: Sequence[Curves]) -> Figure | None:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        maps = [(result, _grid(result, False), _grid(result, True)) for result in results]
        beside = any(np.isfinite(measured).any() for _, _, measured in maps)
        most = max(float(np.nanmax(np.stack([predicted, measured]))) for _, predicted, measured in maps)
        norm = LogNorm(1.0, max(most, 1.1))
        columns = max(len(_bounds(result)) for result in results)
        heights = [0.9 + 0.21 * len(result.layers) for result in results]
        width = (2 if beside else 1) * (0.7 + min(8.0, max(2.4, 0.48 * columns))) + 0.9
        figure = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
        panels = figure.subplots(len(maps), 2 if beside else 1, squeeze=False, height_ratios=heights)
        for line, (result, predicted, measured) in zip(panels, maps, strict=True):
            image = _draw_map(line[0], predicted, result, norm, "predicted")
            if beside:
                _draw_map(line[1], measured, result, norm, "measured (grey: not)")
        colourbar = figure.colorbar(image, ax=panels, label="ratio of blocks", pad=0.02, aspect=30)
        ticks = [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if tick <= norm.vmax]
        colourbar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
        colourbar.minorticks_off()
        return figure

    def table(self, results: Sequence[Curves]) -> str:
        lines = [
            [
                result.heading,
                str(curve.group),
                f"{point.bound:g}",
                interval(point.rate),
                number(point.measured_ratio, ".2f"),
            ]
            for result in results
            for curve in result.layers
            for point in curve.points
        ]
        return "Ratio: blocks before / after in one layer.\n\n" + table(("traffic",), NUMBERS, lines)


NUMBERS = ("layer", "bound", "ratio predicted", "ratio measured")


def _bounds(result: Curves) -> list[float]:
    return sorted({point.bound for curve in result.layers for point in curve.points})


def _grid(result: Curves, measured: bool) -> np.ndarray:
    """Ratios `[layers, bounds]`, NaN where there is none."""
    bounds = {bound: column for column, bound in enumerate(_bounds(result))}
    grid = np.full((len(result.layers), len(bounds)), np.nan)
    for line, curve in enumerate(result.layers):
        for point in curve.points:
            value = point.measured_ratio if measured else point.rate.ratio
            grid[line, bounds[point.bound]] = math.nan if value is None else value
    return grid


def _draw_map(axes: Axes, values: np.ndarray, result: Curves, norm: Any, what: str) -> Any:
    import matplotlib

    bounds, layers = _bounds(result), [str(curve.group) for curve in result.layers]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.88")
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    axes.set_title(f"{result.traffic.replace('_', '-')}: {what}", fontsize=10)
    axes.set_xticks(range(len(bounds)), [f"{bound:g}" for bound in bounds], fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("bound on the relative error", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    if len(bounds) <= MOST_NUMBERED_BOUNDS:
        for (line, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "black" if norm(value) > 0.6 else "white"
                text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
                axes.text(column, line, text, ha="center", va="center", fontsize=7, color=ink)
    return image
