"""The paper's Table 2 and Figure 6: chunk scope, what it saves and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from jointkv.evaluate.paper.result import ChunkRow, FusedRow, PaperResult
from jointkv.report.figure import grid, grouped_bars, kl_axis, legend_below
from jointkv.report.markdown import Columns, beside, number
from jointkv.report.pictures.base import Picture, source


def policy_of(row: FusedRow) -> str:
    """Policy and threshold, which make a line or bars of one colour."""
    return row.policy if row.threshold is None else f"{row.policy} {row.threshold:g}"


FUSED_TEXT: Columns[FusedRow] = {
    "data set": lambda row: row.dataset,
    "policy": lambda row: row.policy,
    "threshold": lambda row: number(row.threshold, "g"),
}
TEXT: Columns[ChunkRow] = {**FUSED_TEXT, "metric": lambda row: row.metric, "source": source}
NUMBERS: Columns[ChunkRow] = {
    "ratio, fused layers": lambda row: f"{row.ratio_fused_layers:.2f}",
    "KL": lambda row: number(row.kl, ".3g"),
    "top-1 equal": lambda row: number(row.top1, ".3f"),
    "score (unfused)": lambda row: beside(row.score, row.score_unfused, ".3f"),
}


class PaperChunk(Picture[PaperResult]):
    """Ratio (above) and KL (below): a group of bars per data set, a bar per policy and threshold."""

    name = "paper_chunk"
    reads = PaperResult
    about = "Ratio: blocks before / after in the layers that may be fused. KL in nats per token."
    text, numbers = TEXT, NUMBERS

    def rows(self, results: Sequence[PaperResult]) -> list[ChunkRow]:
        return [row for result in results for row in result.chunk]

    def draw(self, results: Sequence[PaperResult]) -> Figure | None:
        rows = self.rows(results)
        datasets = list(dict.fromkeys(row.dataset for row in rows))
        policies: dict[str, list[ChunkRow]] = {}
        for row in rows:
            policies.setdefault(policy_of(row), []).append(row)
        figure, (ratio, cost) = grid(2, 1, (min(20.0, 2.2 + len(datasets) * max(1.2, 0.46 * len(policies))), 3.0))
        for axes, field, form in ((ratio, "ratio_fused_layers", ".2f"), (cost, "kl", ".1g")):
            bars = {
                policy: [(row.dataset, getattr(row, field), number(getattr(row, field), form)) for row in chosen]
                for policy, chosen in policies.items()
            }
            grouped_bars(axes, datasets, bars)
        ratio.set_ylabel("ratio in the fused layers")
        ratio.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ratio.margins(y=0.15)
        cost.set_ylabel("KL (nats per token)")
        kl_axis(cost, max(row.kl or 0.0 for row in rows))
        legend_below(figure, 4 if len(datasets) > 2 else 2)
        return figure
