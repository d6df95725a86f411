"""The paper's Table 1 and Figure 5: ratio and F1 against batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.markdown import number, table
from jointkv.report.pictures.base import Picture, colour, grid, legend_below, marker
from jointkv.report.results import BatchRow, PaperResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4


class PaperBatch(Picture[PaperResult]):
    """Ratio against batch size with F1 below it: a column per data set, a line per policy and threshold."""

    name = "paper_batch"
    reads = PaperResult

    def shows(self, result: PaperResult) -> bool:
        return bool(result.batch)

    def draw(self, results: Sequence[PaperResult]) -> Figure | None:
        rows = _rows(results)
        datasets = list(dict.fromkeys(row.dataset for row in rows))
        columns = min(COLUMNS, len(datasets))
        lines = -(-len(datasets) // columns)
        figure, panels = grid(2 * lines * columns, columns, (3.9, 2.9))
        policies = list(dict.fromkeys(map(policy_of, rows)))
        for place in range(lines * columns):
            above = 2 * columns * (place // columns) + place % columns
            upper, lower = panels[above], panels[above + columns]
            if place >= len(datasets):
                upper.remove()
                lower.remove()
                continue
            chosen = [row for row in rows if row.dataset == datasets[place]]
            _draw_ratio(upper, chosen, policies)
            _draw_f1(lower, chosen, policies)
            stand_in = " (stand-in)" if any(row.stand_in for row in chosen) else ""
            upper.set_title(datasets[place] + stand_in, fontsize=10)
            if place % columns == 0:
                upper.set_ylabel("ratio, all layers")
                lower.set_ylabel("F1")
        legend_below(figure, 4 if columns > 1 else 2)
        return figure

    def table(self, results: Sequence[PaperResult]) -> str:
        return (
            "Ratio: blocks before / after, in all layers and in those that may be fused. KL in nats per token.\n\n"
            + table(WORDS, NUMBERS, map(_line, _rows(results)))
        )


WORDS = ("data set", "policy", "threshold", "source")
NUMBERS = ("batch", "ratio", "ratio, fused layers", "KL", "top-1 equal", "F1 (unfused)")


def policy_of(row: BatchRow) -> str:
    """Policy and threshold, which make a line."""
    return row.policy if row.threshold is None else f"{row.policy} {row.threshold:g}"


def _line(row: BatchRow) -> list[str]:
    f1 = number(row.f1, ".3f")
    return [
        row.dataset,
        row.policy,
        number(row.threshold, "g"),
        row.source + (" (stand-in)" if row.stand_in else ""),
        str(row.batch),
        f"{row.ratio:.2f}",
        number(row.ratio_fused_layers, ".2f"),
        number(row.kl, ".3g"),
        number(row.top1, ".3f"),
        f1 if row.f1_unfused is None else f"{f1} ({row.f1_unfused:.3f})",
    ]


def _rows(results: Sequence[PaperResult]) -> list[BatchRow]:
    return sorted((row for result in results for row in result.batch), key=lambda row: row.batch)


def _draw_ratio(axes: Axes, rows: Sequence[BatchRow], policies: Sequence[str]) -> None:
    for place, policy in enumerate(policies):
        chosen = [row for row in rows if policy_of(row) == policy]
        sizes, ratios = [row.batch for row in chosen], [row.ratio for row in chosen]
        axes.plot(sizes, ratios, marker=marker(place), color=colour(place), markersize=5, label=policy)
    # Linear, so that growth with the logarithm of the batch size is a straight line.
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    _batch_axis(axes, rows)


def _draw_f1(axes: Axes, rows: Sequence[BatchRow], policies: Sequence[str]) -> None:
    unfused = sorted({(row.batch, row.f1_unfused) for row in rows if row.f1_unfused is not None})
    if unfused:
        axes.plot(
            *zip(*unfused, strict=True), color="black", linestyle=":", linewidth=2, label="unfused (F1)", zorder=4
        )
    for place, policy in enumerate(policies):
        chosen = [(row.batch, row.f1) for row in rows if policy_of(row) == policy and row.f1 is not None]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), marker=marker(place), color=colour(place), markersize=5)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])
    axes.margins(y=0.15)
    _batch_axis(axes, rows)
    axes.set_xlabel("batch size (requests)")


def _batch_axis(axes: Axes, rows: Sequence[BatchRow]) -> None:
    from matplotlib.ticker import NullLocator

    sizes = sorted({row.batch for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
