"""What every picture is, and how figures are laid out and written."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from jointkv.report.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

R = TypeVar("R", bound=Result)

# Ratios worth a mark on a logarithmic axis.
_RATIO_TICKS = (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_MOST_TICKS = 7
# Inches.
_LEGEND_LINE = 0.2
_DPI = 130


class Picture(ABC, Generic[R]):
    """One picture and the table beside it, from all results of one format.

    Attributes:
        name: of its files, without suffix.
        reads: the format it is drawn from.
    """

    name: ClassVar[str]
    reads: type[R]

    @abstractmethod
    def shows(self, result: R) -> bool:
        """Whether there is anything in `result` that the picture or its table shows."""

    @abstractmethod
    def draw(self, results: Sequence[R]) -> Figure | None:
        """The picture of `results`, all of which it shows something of; None if only the table has something."""

    @abstractmethod
    def table(self, results: Sequence[R]) -> str:
        """The same numbers as Markdown, with a line above that says what they are."""


def grid(count: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `size` inches, at most `columns` in a row, filled row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def legend_below(figure: Figure, columns: int, handles: Sequence[Any] = (), title: str | None = None) -> None:
    """One legend for all panels, under them: `handles`, or each label once. The figure grows to make room."""
    if not handles:
        found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        handles = list({label: handle for handle, label in reversed(found)}.values())[::-1]
    columns = min(columns, len(handles))
    lines = -(-len(handles) // columns) + (title is not None)
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * lines)
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=title,
    )


def colour(number: int) -> Any:
    """The `number`th of 18 colours, all dark enough for a thin line."""
    import matplotlib

    number %= 18
    return matplotlib.colormaps["tab10"](number) if number < 10 else matplotlib.colormaps["Dark2"](number - 10)


def marker(number: int) -> str:
    """The `number`th marker."""
    return "osD^vPX<>phd*H8"[number % 15]


def ratio_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """Make `which` ("x" or "y") a logarithmic axis from `low` to `high` with round ratios at its ticks."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = low / 1.06, high * 1.06
    inside = [tick for tick in _RATIO_TICKS if low <= tick <= high]
    every = -(-len(inside) // _MOST_TICKS)
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis.set_major_locator(FixedLocator(inside[::every]) if high > 2 * low else MaxNLocator(_MOST_TICKS - 1))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def kl_axis(axes: Axes, linear_to: float, most: float) -> None:
    """Make y an axis for KL up to `most`: linear from 0 to `linear_to`, logarithmic above, so that 0 has a place."""
    axes.set_yscale("symlog", linthresh=linear_to, linscale=0.6)
    axes.set_ylim(-linear_to / 4, max(most, 10 * linear_to) * 2)


def png(figure: Figure) -> bytes:
    """`figure` as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()
