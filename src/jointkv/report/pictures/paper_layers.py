"""The ratio of every layer against what the Poisson model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.markdown import number, table
from jointkv.report.pictures.base import Picture, grid, legend_below, ratio_axis
from jointkv.report.results import LayerRow, PaperResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREDICTIONS = (
    ("poisson", "poisson_low", "poisson_high", "Poisson", "#f29900", "--"),
    ("rarefaction", "low", "high", "rarefaction", "#1a73e8", "-"),
    ("tree", None, None, "tree", "#188038", "-."),
)
"""Fields of a prediction, of the ends of its interval; its label, colour and line."""


class PaperLayers(Picture[PaperResult]):
    """Measured and predicted ratio against layer: a panel per threshold."""

    name = "paper_layers"
    reads = PaperResult

    def shows(self, result: PaperResult) -> bool:
        return bool(result.layers)

    def draw(self, results: Sequence[PaperResult]) -> Figure | None:
        groups: dict[str, list[LayerRow]] = {}
        for row in _rows(results):
            heading = f"threshold {row.threshold:g}"
            groups.setdefault(heading if row.dataset is None else f"{row.dataset}, {heading}", []).append(row)
        figure, panels = grid(len(groups), 3, (4.8, 3.6))
        for axes, (heading, rows) in zip(panels, groups.items(), strict=True):
            _draw_layers(axes, rows)
            axes.set_title(heading, fontsize=10)
            axes.set_xlabel("layer")
        for axes in panels[:: min(3, len(panels))]:
            axes.set_ylabel("ratio (blocks before / after)")
        legend_below(figure, 4 if len(panels) > 1 else 2)
        return figure

    def table(self, results: Sequence[PaperResult]) -> str:
        return "Ratio of one layer, blocks before / after; predictions with their intervals.\n\n" + table(
            WORDS, NUMBERS, map(_line, _rows(results))
        )


WORDS = ("data set", "threshold")
NUMBERS = ("layer", "measured", "Poisson", "tree", "rarefaction")


def _line(row: LayerRow) -> list[str]:
    return [
        row.dataset or "-",
        f"{row.threshold:g}",
        str(row.layer),
        f"{row.measured:.2f}",
        _interval(row.poisson, row.poisson_low, row.poisson_high),
        number(row.tree, ".2f"),
        _interval(row.rarefaction, row.low, row.high),
    ]


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return number(value, ".2f") + ends


def _rows(results: Sequence[PaperResult]) -> list[LayerRow]:
    return sorted((row for result in results for row in result.layers), key=lambda row: (row.threshold, row.layer))


def _draw_layers(axes: Axes, rows: Sequence[LayerRow]) -> None:
    everything = [row.measured for row in rows]
    for field, low, high, label, hue, line in PREDICTIONS:
        known = [row for row in rows if getattr(row, field) is not None]
        layers, values = [row.layer for row in known], [getattr(row, field) for row in known]
        if low is not None and high is not None:
            ends = [(row.layer, getattr(row, low), getattr(row, high)) for row in known]
            whole = [each for each in ends if None not in each]
            if whole:
                axes.fill_between(*zip(*whole, strict=True), color=hue, alpha=0.15, linewidth=0)
                everything += [end for _, *pair in whole for end in pair]
        if known:
            axes.plot(layers, values, line, color=hue, label=f"predicted: {label}")
            everything += values
    axes.plot(
        [row.layer for row in rows],
        [row.measured for row in rows],
        "o",
        color="#d93025",
        markersize=4.5,
        label="measured",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    # An interval that says nothing must not press the rest flat.
    most = 2 * max(line.get_ydata().max() for line in axes.lines)
    ratio_axis(axes, "y", min(everything), min(most, max(everything)))
