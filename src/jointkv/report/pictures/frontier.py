"""Ratio against KL of every policy that was tried, and what nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jointkv.evaluate.frontier.result import KL_LIMITS, FrontierResult, FrontierRow, best_within, frontier
from jointkv.report.figure import colour, grid, legend_below, log_axis, plain_ticks
from jointkv.report.markdown import NOT_MEASURED, Columns, table, words
from jointkv.report.pictures.base import Picture

Row = tuple[str, str, Sequence[FrontierRow]]
"""A traffic, a kind of candidates, and its rows."""

LEAST_KL = 1e-6
LIMIT = 1e-3

KINDS: Mapping[str, tuple[str, str, str]] = {
    "equal tokens, a page": ("tokens", "page", "error"),
    "similar blocks, a page": ("signature", "page", "error"),
    "similar blocks, a direction": ("signature", "direction", "error"),
    "similar blocks, keys alone decide": ("signature", "direction", "keys"),
}


class Frontier(Picture[FrontierResult]):
    """A panel per traffic: every policy a dot, and for each kind of candidates the line that nothing beats."""

    name = "frontier"
    reads = FrontierResult
    about = (
        "The largest ratio of pages within a mean KL (nats), and with what: tokens per block, layer groups, what "
        "serves, and the bound on the error or the cosine of keys. 1.00 where nothing may be shared."
    )

    def rows(self, results: Sequence[FrontierResult]) -> list[Row]:
        rows = [row for result in results for row in result.rows]
        kinds = dict.fromkeys((row.traffic, row.candidates) for row in rows)
        return [
            (traffic, candidates, [row for row in rows if (row.traffic, row.candidates) == (traffic, candidates)])
            for traffic, candidates in kinds
        ]

    def draw(self, results: Sequence[FrontierResult]) -> Figure | None:
        rows = [row for result in results for row in result.rows]
        traffics = list(dict.fromkeys(row.traffic for row in rows))
        figure, panels = grid(len(traffics), 4, (3.2, 3.2), "ratio of pages")
        for axes, traffic in zip(panels, traffics, strict=True):
            _draw(axes, [row for row in rows if row.traffic == traffic])
            axes.set_title(words(traffic))
        legend_below(figure, 4)
        return figure

    def table(self, results: Sequence[FrontierResult]) -> str:
        text: Columns[Row] = {"traffic": lambda row: words(row[0]), "candidates": lambda row: row[1]}
        numbers: Columns[Row] = {
            f"KL at most {limit:g}": lambda row, limit=limit: _cell(best_within(row[2], limit))  # type: ignore[misc]
            for limit in KL_LIMITS
        }
        return f"{self.about}\n\n{table(text, numbers, self.rows(results))}"

    def conditions(self, result: FrontierResult) -> Mapping[str, object]:
        return {"model": result.model, "dtype": result.dtype}


def _draw(axes: Axes, rows: Sequence[FrontierRow]) -> None:
    for place, (label, kind) in enumerate(KINDS.items()):
        shown = [row for row in rows if (row.candidates, row.serves, row.decides) == kind]
        for chosen, look in ((shown, {"linestyle": "", "alpha": 0.35}), (frontier(shown), {"linestyle": "-"})):
            points = [(max(row.kl, LEAST_KL), row.ratio) for row in chosen]
            if points:
                named = {"label": label} if look["linestyle"] else {}
                axes.plot(*zip(*points, strict=True), "o", color=colour(place), markersize=3.5, **look, **named)
    axes.axvline(LIMIT, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("KL (nats)")
    log_axis(axes, "x", LEAST_KL / 2, max(LIMIT, *(row.kl for row in rows)))
    axes.set_xticks([10.0**power for power in range(-6, 1, 2)])
    log_axis(axes, "y", 1.0, max(1.5, *(row.ratio for row in rows)))
    plain_ticks(axes.yaxis)


def _cell(row: FrontierRow | None) -> str:
    if row is None:
        return NOT_MEASURED
    if row.ratio == 1:
        return "1.00"
    return f"{row.ratio:.2f} ({row.block_size}, {row.layer_groups}, {row.serves}, {row.decides} {row.level:g})"
