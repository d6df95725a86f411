"""What it costs not to compute what is resident: methods that read it, at as much arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jointkv.evaluate.compare.result import Evaluation, MethodRow
from jointkv.report.figure import colour, grid, kl_axis, legend_below, marker
from jointkv.report.markdown import NOT_MEASURED, Columns, number, table, words
from jointkv.report.pictures.base import Picture
from jointkv.report.pictures.kl_against_bytes import KLAgainstBytes


class KLAgainstComputed(Picture[Evaluation]):
    """KL against the share of the prefill that was computed: a panel per traffic, a line per method."""

    name = "kl_against_computed"
    reads = Evaluation
    about = (
        "Computed: floating-point operations of the prefill over those of computing everything. Skipped: tokens that "
        "are read behind another text. KL in nats per token, mean and worst request. Diverged: requests whose greedy "
        "output is another one than the unfused model's."
    )

    def rows(self, results: Sequence[Evaluation]) -> list[MethodRow]:
        return [row for result in results for row in result.rows if row.work is not None and row.kl is not None]

    def draw(self, results: Sequence[Evaluation]) -> Figure:
        rows = self.rows(results)
        methods = list(dict.fromkeys(row.method for row in rows))
        traffics = list(dict.fromkeys(row.traffic for row in rows))
        label = "KL to the unfused model\n(nats per token; whisker: worst request)"
        figure, panels = grid(len(traffics), 3, (4.4, 3.6), label, sharey=True)
        most = max(max(row.kl or 0.0, row.kl_worst_request or 0.0) for row in rows)
        for axes, traffic in zip(panels, traffics, strict=True):
            for place, method in enumerate(methods):
                _draw(axes, [row for row in rows if (row.traffic, row.method) == (traffic, method)], place)
            kl_axis(axes, most)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_xlim(0, 1)
            axes.set_xlabel("prefill computed (FLOPs)")
            axes.set_title(words(traffic))
        legend_below(figure, 5)
        return figure

    def table(self, results: Sequence[Evaluation]) -> str:
        return f"{self.about}\n\n{table(TEXT, NUMBERS, self.rows(results))}"

    def conditions(self, result: Evaluation) -> Mapping[str, object]:
        return KLAgainstBytes().conditions(result)


TEXT: Columns[MethodRow] = {
    "traffic": lambda row: words(row.traffic),
    "method": lambda row: row.method,
    "level": lambda row: f"{row.level:g}",
}
NUMBERS: Columns[MethodRow] = {
    "computed": lambda row: NOT_MEASURED if row.work is None else f"{row.work.computed_share:.1%}",
    "skipped": lambda row: NOT_MEASURED if row.work is None else f"{row.work.skipped_share:.1%}",
    "KL": lambda row: number(row.kl, ".3g"),
    "KL, worst request": lambda row: number(row.kl_worst_request, ".3g"),
    "top-1 equal": lambda row: number(row.top1, ".3f"),
    "diverged": lambda row: NOT_MEASURED if row.diverged is None else f"{row.diverged:.0%}",
}


def _draw(axes: Axes, rows: Sequence[MethodRow], place: int) -> None:
    points = sorted(
        (row.work.computed_share, row.kl or 0.0, row.kl_worst_request or row.kl or 0.0)
        for row in rows
        if row.work is not None
    )
    if not points:
        return
    computed, mean, worst = zip(*points, strict=True)
    axes.vlines(computed, mean, worst, color=colour(place), linewidth=0.8, alpha=0.6, zorder=1)
    axes.plot(computed, mean, color=colour(place), marker=marker(place), markersize=5, label=rows[0].method)
