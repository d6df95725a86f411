"""The paper's Table 1 and Figure 5: ratio and F1 against batch size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jointkv.evaluate.paper.result import BatchRow, PaperResult
from jointkv.report.figure import colour, grid, legend_below, marker
from jointkv.report.markdown import Columns, beside, number
from jointkv.report.pictures.base import Picture, source
from jointkv.report.pictures.paper_chunk import FUSED_TEXT, policy_of

TEXT: Columns[BatchRow] = {**FUSED_TEXT, "source": source}
NUMBERS: Columns[BatchRow] = {
    "batch": lambda row: str(row.batch),
    "ratio": lambda row: f"{row.ratio:.2f}",
    "ratio, fused layers": lambda row: number(row.ratio_fused_layers, ".2f"),
    "KL": lambda row: number(row.kl, ".3g"),
    "top-1 equal": lambda row: number(row.top1, ".3f"),
    "F1 (unfused)": lambda row: beside(row.f1, row.f1_unfused, ".3f"),
}


class PaperBatch(Picture[PaperResult]):
    """Ratio against batch size with F1 below it: a column per data set, a line per policy and threshold."""

    name = "paper_batch"
    reads = PaperResult
    about = "Ratio: blocks before / after, in all layers and in those that may be fused. KL in nats per token."
    text, numbers = TEXT, NUMBERS

    def rows(self, results: Sequence[PaperResult]) -> list[BatchRow]:
        return sorted((row for result in results for row in result.batch), key=lambda row: row.batch)

    def draw(self, results: Sequence[PaperResult]) -> Figure | None:
        rows = self.rows(results)
        datasets = list(dict.fromkeys(row.dataset for row in rows))
        policies = list(dict.fromkeys(map(policy_of, rows)))
        columns = len(datasets)
        figure, panels = grid(2 * columns, columns, (3.9, 2.9))
        panels[0].set_ylabel("ratio, all layers")
        panels[columns].set_ylabel("F1")
        for dataset, upper, lower in zip(datasets, panels[:columns], panels[columns:], strict=True):
            _draw(upper, lower, [row for row in rows if row.dataset == dataset], policies)
        legend_below(figure, 4 if columns > 1 else 2)
        return figure


def _draw(upper: Axes, lower: Axes, rows: Sequence[BatchRow], policies: Sequence[str]) -> None:
    """Linear, so that growth with the logarithm of the batch size is a straight line."""
    for place, policy in enumerate(policies):
        chosen = [row for row in rows if policy_of(row) == policy]
        sizes, look = [row.batch for row in chosen], {"marker": marker(place), "color": colour(place), "markersize": 5}
        upper.plot(sizes, [row.ratio for row in chosen], label=policy, **look)
        lower.plot(sizes, [row.f1 for row in chosen], **look)
    unfused = sorted({(row.batch, row.f1_unfused) for row in rows})
    look = {"color": "black", "linestyle": ":"}
    lower.plot(*zip(*unfused, strict=True), label="unfused (F1)", linewidth=2, zorder=4, **look)
    upper.axhline(1, linewidth=0.8, **look)
    upper.set_title(rows[0].dataset + (" (stand-in)" if any(row.stand_in for row in rows) else ""))
    lower.set_xlabel("batch size (requests)")
    lower.margins(y=0.15)
    batches = sorted({row.batch for row in rows})
    for axes in (upper, lower):
        axes.set_xscale("log", base=2)
        axes.set_xlim(batches[0] / 1.2, batches[-1] * 1.2)
        axes.set_xticks(batches, [str(size) for size in batches], fontsize=8)
        axes.minorticks_off()
