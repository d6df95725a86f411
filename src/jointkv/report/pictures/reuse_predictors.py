"""What predicts a skipped block: tokens that need not be computed, against blocks that should have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jointkv.evaluate.reuse.result import ALL, Curve, HeldOutRow, ReuseResult, RuleRow
from jointkv.report.figure import colour, grid, legend_below
from jointkv.report.markdown import NOT_MEASURED, Columns, table
from jointkv.report.pictures.base import Picture

TARGET = 0.01
DRAWN = ("entry", "entry, no echo", "witnesses", "scaled", "two sources", "echoes covered", "echoes explain", "truth")
MOST_MISSED = 0.1
LINEAR_TO = 0.001

Row = tuple[ReuseResult, HeldOutRow | RuleRow]


class ReusePredictors(Picture[ReuseResult]):
    """A row of panels per result, a panel per kind of headers, a line per predictor, the rule of the engine a star."""

    name = "reuse_predictors"
    reads = ReuseResult
    about = (
        "Share of all prompt tokens skipped (and of the reused blocks beyond the bounds) at an audited miss rate of "
        "1%; limits chosen on other texts. The rule has no limit to choose. Headers and entry blocks are computed."
    )

    def rows(self, results: Sequence[ReuseResult]) -> list[Row]:
        chosen = [
            (result, row) for result in results for row in result.held_out if (row.rate, row.chosen) == (TARGET, "all")
        ]
        return [*chosen, *((result, row) for result in results for row in result.rule)]

    def draw(self, results: Sequence[ReuseResult]) -> Figure | None:
        kinds = list(dict.fromkeys(curve.kind for result in results for curve in result.curves))
        if not kinds:
            return None
        count = len(kinds) * len(results)
        figure, panels = grid(count, len(kinds), (3.2, 3.2), "prompt tokens skipped", sharey=True)
        places = [(result, kind) for result in results for kind in kinds]
        for axes, (result, kind) in zip(panels, places, strict=True):
            size = max(curve.block_size for curve in result.curves)
            shown = [curve for curve in result.curves if (curve.kind, curve.block_size) == (kind, size)]
            for curve in shown:
                if curve.predictor in DRAWN:
                    _draw_curve(axes, curve)
            _draw_rule(axes, result, shown[0] if shown else None)
            axes.axvline(TARGET, color="black", linewidth=0.8, linestyle=":")
            axes.set_xscale("symlog", linthresh=LINEAR_TO, linscale=0.5)
            axes.set_xlim(-LINEAR_TO / 4, MOST_MISSED)
            axes.set_xticks([0, LINEAR_TO, TARGET, MOST_MISSED])
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(0, 1)
            axes.set_xlabel("reused blocks beyond the bounds")
            axes.set_title(f"{'all kinds' if kind == ALL else kind}, blocks of {size}")
        legend_below(figure, 5)
        return figure

    def table(self, results: Sequence[ReuseResult]) -> str:
        kinds = list(dict.fromkeys(kind for _, row in self.rows(results) for kind in row.shares))
        numbers: Columns[Row] = {
            "all kinds" if kind == ALL else kind: lambda row, kind=kind: _cell(row[1], kind)  # type: ignore[misc]
            for kind in sorted(kinds, key=lambda kind: kind != ALL)
        }
        return f"{self.about}\n\n{table(TEXT, numbers, self.rows(results))}"

    def conditions(self, result: ReuseResult) -> Mapping[str, object]:
        return {"model": result.model, "dtype": result.dtype}


TEXT: Columns[Row] = {
    "seed": lambda row: str(row[0].settings.get("seed", NOT_MEASURED)),
    "block": lambda row: str(row[1].block_size),
    "sources": lambda row: str(row[1].sources),
    "witnesses": lambda row: str(row[1].witnesses),
    "predictor": lambda row: row[1].predictor if isinstance(row[1], HeldOutRow) else "the engine's rule",
}


def _cell(row: HeldOutRow | RuleRow, kind: str) -> str:
    share = row.shares.get(kind)
    if share is None:
        return NOT_MEASURED
    return f"{share.skipped:.1%}" + ("" if share.missed is None else f" ({share.missed:.2%})")


def _draw_curve(axes: Axes, curve: Curve) -> None:
    place = DRAWN.index(curve.predictor)
    bold = curve.predictor == "echoes explain"
    look = {"linewidth": 2.4 if bold else 1.2, "linestyle": "--" if curve.predictor == "truth" else "-"}
    axes.plot(curve.missed, curve.skipped, color=colour(place), label=curve.predictor, zorder=3 if bold else 2, **look)


def _draw_rule(axes: Axes, result: ReuseResult, like: Curve | None) -> None:
    """The rule where as much is known as for the curve `like`."""
    for row in result.rule:
        if like and (row.block_size, row.sources, row.witnesses) == (like.block_size, like.sources, like.witnesses):
            share = row.shares[like.kind]
            if share.missed is not None:
                axes.plot([share.missed], [share.skipped], "*", color="black", markersize=9, label="the engine's rule")
