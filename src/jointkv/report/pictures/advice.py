"""What of a log need not be computed, and what breaks its prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jointkv.evaluate.advise.result import Advice, Breaking
from jointkv.report.figure import colour, grid, key, legend_below
from jointkv.report.markdown import table
from jointkv.report.pictures.base import Picture

PARTS = ("exact_tokens", "same_tokens", "moved_tokens", "new_tokens")
WORDS = {
    "exact_tokens": "exact prefix",
    "same_tokens": "same text and position, other text before it",
    "moved_tokens": "same text at another position",
    "new_tokens": "new",
}
HUES = {"exact_tokens": colour(2), "same_tokens": colour(0), "moved_tokens": colour(4), "new_tokens": "#c7c7c7"}
"""Of the parts of a prompt; what is computed in any case is grey."""


class AdvicePicture(Picture[Advice]):
    """A bar per log with its prompt tokens by kind, and below it what each difference keeps from being found."""

    name = "advice"
    reads = Advice
    about = (
        "Prompt tokens by what would find them, in the order of the log, and what exact prefix caching would find in "
        "addition if a difference stood behind what it breaks."
    )

    def rows(self, results: Sequence[Advice]) -> Sequence[Advice]:
        return results

    def draw(self, results: Sequence[Advice]) -> Figure | None:
        figure, panels = grid(2, 1, (7.6, 1.0 + 0.5 * max(len(results), 2)))
        draw_parts(panels[0], results)
        draw_breaks(panels[1], [(each, row) for each in results for row in each.breaks])
        legend_below(figure, 2, [key(WORDS[part], color=HUES[part]) for part in PARTS])
        return figure

    def table(self, results: Sequence[Advice]) -> str:
        shares = {WORDS[part]: lambda row, part=part: f"{row.share(getattr(row, part)):.1%}" for part in PARTS}
        counts = {"requests": lambda row: f"{row.requests:,}", "prompt tokens": lambda row: f"{row.tokens:,}"}
        logs = table({"log": lambda row: row.source}, counts | shares, results)
        pairs = [(each, row) for each in results for row in each.breaks]
        text = {
            "log": lambda pair: pair[0].source,
            "what differs": lambda pair: pair[1].says,
            "behind": lambda pair: f"`{pair[1].anchor}`" if pair[1].anchor else "the beginning",
            "advice": lambda pair: pair[1].advice,
        }
        numbers = {
            "token": lambda pair: f"{pair[1].token:,}",
            "requests": lambda pair: f"{pair[1].requests:,}",
            "tokens to gain": lambda pair: f"{pair[1].gain:,}",
            "of all": lambda pair: f"{pair[1].gain_share:.1%}",
        }
        breaks = f"\n{table(text, numbers, pairs)}" if pairs else ""
        return f"{self.about}\n\n{logs}{breaks}"


def draw_parts(axes: Axes, results: Sequence[Advice]) -> None:
    """A stacked bar for each log."""
    for place, result in enumerate(results):
        left = 0.0
        for part in PARTS:
            share = result.share(getattr(result, part))
            axes.barh(place, share, left=left, color=HUES[part], height=0.6)
            if share > 0.04:
                axes.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8)
            left += share
    axes.set_yticks(range(len(results)), [result.source for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Prompt tokens by what finds them")


def draw_breaks(axes: Axes, found: Sequence[tuple[Advice, Breaking]]) -> None:
    """A bar for each difference: the share of all prompt tokens that it keeps from being an exact prefix."""
    for place, (_, row) in enumerate(found):
        axes.barh(place, row.gain_share, color=colour(3), height=0.6)
        axes.text(row.gain_share, place, f" {row.gain_share:.0%}", ha="left", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [f"{row.says} at token {row.token:,}" for _, row in found])
    axes.set_ylim(max(len(found), 1) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("What exact prefixes would gain without a difference" if found else "Nothing breaks prefixes")
