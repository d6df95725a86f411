"""How every figure is laid out, coloured, labelled and written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

LIGHT = "#d9d9d9"
# Names in results are the user's and may hold dollar signs, so nothing is read as mathematics.
STYLE = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,
}
MARKERS = "osD^vPX<>phd*H8"
ROUND = (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)
"""Numbers worth a mark on a logarithmic axis, times powers of ten."""
MOST_TICKS = 7
LINEAR_KL = 1e-6
"""KL below this is rounding in float32."""
MOST_NUMBERED = 40
"""With more columns of a heat map the cells are too narrow for numbers."""
LEGEND_LINE = 0.2  # inches


def style(**options: Any) -> AbstractContextManager[None]:
    """Figures are made and written inside it; `options` are further settings of matplotlib."""
    return matplotlib.rc_context({**STYLE, **options})


def grid(
    count: int, columns: int, size: tuple[float, float], left: str = "", **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `size` inches, at most `columns` in a row; `left` labels the y of each row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels[::columns]:
        axes.set_ylabel(left)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def key(label: str, **look: Any) -> Line2D:
    """An entry of a legend: a marker, unless `look` has a line."""
    return Line2D([], [], label=label, **{"linestyle": "", "marker": "s", **look})


def legend_below(figure: Figure, columns: int, handles: Sequence[Any] = (), title: str | None = None) -> None:
    """One legend for all panels, under them: `handles`, or each label once. The figure grows to make room."""
    if not handles:
        found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        handles = list({label: handle for handle, label in reversed(found)}.values())[::-1]
    columns = min(columns, len(handles))
    lines = -(-len(handles) // columns) + (title is not None)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * lines)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, title=title)


def colour(number: int) -> str:
    """The `number`th of 18 colours, all dark enough for a thin line."""
    number %= 18
    name, place = ("tab10", number) if number < 10 else ("Dark2", number - 10)
    return to_hex(matplotlib.colormaps[name](place))


def marker(number: int) -> str:
    """The `number`th marker."""
    return MARKERS[number % len(MARKERS)]


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """Make `which` ("x" or "y") a logarithmic axis from `low` to `high` with round numbers at its ticks."""
    low, high = low / 1.06, high * 1.06
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(
        FixedLocator(_ticks(low, high)) if high > 2 * low else MaxNLocator(MOST_TICKS, steps=(1, 2, 5))
    )
    plain_ticks(axis)


def _ticks(low: float, high: float) -> list[float]:
    every = [digit * 10.0**power for power in range(-9, 10) for digit in ROUND]
    inside = [tick for tick in every if low <= tick <= high]
    step = -(-len(inside) // MOST_TICKS)
    return inside[inside.index(1.0) % step if 1.0 in inside else 0 :: step]


def plain_ticks(axis: Any) -> None:
    """No small ticks between the labelled ones, and plain numbers at these."""
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def kl_axis(axes: Axes, most: float) -> None:
    """Make y an axis for KL up to `most`: linear below `LINEAR_KL`, so that 0 has a place, and logarithmic above."""
    axes.set_yscale("symlog", linthresh=LINEAR_KL, linscale=0.6)
    axes.set_ylim(-LINEAR_KL / 4, max(most, 10 * LINEAR_KL) * 2)
    plain_ticks(axes.yaxis)


def heat_map(axes: Axes, values: Any, rows: Sequence[str], columns: Sequence[str], norm: Normalize, form: str) -> Any:
    """Draw `values`, NaN in grey, with numbers in the cells if they fit; returns the image."""
    colours: Colormap = matplotlib.colormaps["viridis"].with_extremes(bad="0.86")
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    step = -(-len(columns) // MOST_NUMBERED)
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    for (line, column), value in np.ndenumerate(values):
        if step == 1 and np.isfinite(value):
            ink = "black" if norm(value) > 0.6 else "white"
            text = format(value, form).removeprefix("0")
            axes.text(column, line, text, ha="center", va="center", fontsize=7, color=ink)
    return image


def grouped_bars(
    axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[tuple[str, float | None, str]]]
) -> None:
    """A bar for each of `series` in each group: of which group, how high (None: not measured) and what it says."""
    width = 0.84 / len(series)
    for place, (label, bars) in enumerate(series.items()):
        known = [(groups.index(group), height, text) for group, height, text in bars if height is not None]
        at = [index + (place - (len(series) - 1) / 2) * width for index, _, _ in known]
        drawn = axes.bar(at, [height for _, height, _ in known], 0.9 * width, color=colour(place), label=label)
        axes.bar_label(drawn, [text for _, _, text in known], fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)


def png(figure: Figure) -> bytes:
    """`figure` as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
