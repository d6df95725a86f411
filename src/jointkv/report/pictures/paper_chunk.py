"""The paper's Table 2 and Figure 6: chunk scope, what it saves and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.markdown import number, table
from jointkv.report.pictures.base import Picture, colour, grid, kl_axis, legend_below
from jointkv.report.results import ChunkRow, PaperResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINEAR_KL = 1e-5


class PaperChunk(Picture[PaperResult]):
    """Ratio (above) and KL (below): a group of bars per data set, a bar per policy and threshold."""

    name = "paper_chunk"
    reads = PaperResult

    def shows(self, result: PaperResult) -> bool:
        return bool(result.chunk)

    def draw(self, results: Sequence[PaperResult]) -> Figure | None:
        rows = _rows(results)
        datasets = list(dict.fromkeys(row.dataset for row in rows))
        policies = list(dict.fromkeys(map(_policy, rows)))
        bar = 0.84 / len(policies)
        figure, (ratio, cost) = grid(2, 1, (min(20.0, 2.2 + len(datasets) * max(1.2, 0.46 * len(policies))), 3.0))
        for number_of, policy in enumerate(policies):
            chosen = [(datasets.index(row.dataset), row) for row in rows if _policy(row) == policy]
            places = [place + (number_of - (len(policies) - 1) / 2) * bar for place, _ in chosen]
            hue = colour(number_of)
            ratios = [row.ratio_fused_layers for _, row in chosen]
            drawn = ratio.bar(places, ratios, bar * 0.9, color=hue, label=policy)
            ratio.bar_label(drawn, [f"{value:.2f}" for value in ratios], fontsize=7, padding=2)
            known = [(place, row.kl) for place, (_, row) in zip(places, chosen, strict=True) if row.kl is not None]
            drawn = cost.bar([place for place, _ in known], [kl for _, kl in known], bar * 0.9, color=hue)
            cost.bar_label(drawn, [f"{kl:.1g}" for _, kl in known], fontsize=7, padding=2)
        ratio.set_ylabel("ratio in the fused layers")
        ratio.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ratio.margins(y=0.15)
        cost.set_ylabel("KL (nats per token)")
        kl_axis(cost, LINEAR_KL, max((row.kl for row in rows if row.kl is not None), default=0.0))
        for axes in (ratio, cost):
            axes.set_xticks(range(len(datasets)), datasets)
            axes.tick_params(axis="x", length=0)
        legend_below(figure, 4 if len(datasets) > 2 else 2)
        return figure

    def table(self, results: Sequence[PaperResult]) -> str:
        return "Ratio: blocks before / after in the layers that may be fused. KL in nats per token.\n\n" + table(
            WORDS, NUMBERS, map(_line, _rows(results))
        )


WORDS = ("data set", "policy", "threshold", "metric", "source")
NUMBERS = ("ratio, fused layers", "KL", "top-1 equal", "score (unfused)")


def _line(row: ChunkRow) -> list[str]:
    score = number(row.score, ".3f")
    return [
        row.dataset,
        row.policy,
        number(row.threshold, "g"),
        row.metric or "-",
        row.source + (" (stand-in)" if row.stand_in else ""),
        f"{row.ratio_fused_layers:.2f}",
        number(row.kl, ".3g"),
        number(row.top1, ".3f"),
        score if row.score_unfused is None else f"{score} ({row.score_unfused:.3f})",
    ]


def _policy(row: ChunkRow) -> str:
    return row.policy if row.threshold is None else f"{row.policy} {row.threshold:g}"


def _rows(results: Sequence[PaperResult]) -> list[ChunkRow]:
    return [row for result in results for row in result.chunk]
