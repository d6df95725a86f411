"""The ratio of every layer against what the Poisson model predicts."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jointkv.evaluate.paper.result import LayerRow, PaperResult
from jointkv.report.figure import colour, grid, legend_below, log_axis
from jointkv.report.markdown import Columns, number
from jointkv.report.pictures.base import Picture

PREDICTIONS = (
    ("rarefaction", "low", "high", "rarefaction", "-"),
    ("poisson", "poisson_low", "poisson_high", "Poisson", "--"),
    ("tree", "tree", "tree", "tree", "-."),
)
"""Fields of a prediction and of the ends of its interval; its label and line."""
TEXT: Columns[LayerRow] = {"data set": lambda row: row.dataset, "threshold": lambda row: f"{row.threshold:g}"}
NUMBERS: Columns[LayerRow] = {
    "layer": lambda row: str(row.layer),
    "measured": lambda row: f"{row.measured:.2f}",
    "Poisson": lambda row: number(row.poisson, ".2f", row.poisson_low, row.poisson_high),
    "tree": lambda row: number(row.tree, ".2f"),
    "rarefaction": lambda row: number(row.rarefaction, ".2f", row.low, row.high),
}


class PaperLayers(Picture[PaperResult]):
    """Measured and predicted ratio against layer: a panel per data set and threshold."""

    name = "paper_layers"
    reads = PaperResult
    about = "Ratio of one layer, blocks before / after; predictions with their intervals."
    text, numbers = TEXT, NUMBERS

    def rows(self, results: Sequence[PaperResult]) -> list[LayerRow]:
        return sorted((row for result in results for row in result.layers), key=lambda row: (row.threshold, row.layer))

    def draw(self, results: Sequence[PaperResult]) -> Figure | None:
        groups: dict[str, list[LayerRow]] = {}
        for row in self.rows(results):
            groups.setdefault(f"{row.dataset}, threshold {row.threshold:g}", []).append(row)
        figure, panels = grid(len(groups), 3, (4.8, 3.6), "ratio (blocks before / after)")
        for axes, (heading, rows) in zip(panels, groups.items(), strict=True):
            _draw(axes, rows)
            axes.set_title(heading)
        legend_below(figure, 4 if len(panels) > 1 else 2)
        return figure


def _draw(axes: Axes, rows: Sequence[LayerRow]) -> None:
    layers, measured = [row.layer for row in rows], [row.measured for row in rows]
    drawn, ends = list(measured), list(measured)
    for place, (*fields, label, line) in enumerate(PREDICTIONS):
        value, low, high = ([getattr(row, field) for row in rows] for field in fields)
        axes.fill_between(layers, low, high, color=colour(place), alpha=0.15, linewidth=0)
        axes.plot(layers, value, line, color=colour(place), label=f"predicted: {label}")
        drawn += value
        ends += low + high
    axes.plot(layers, measured, "o", color=colour(3), markersize=4.5, label="measured")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    # An interval that says nothing must not press the rest flat.
    log_axis(axes, "y", min(*drawn, *ends), min(2 * max(drawn), max(*drawn, *ends)))
