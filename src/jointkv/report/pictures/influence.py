"""How far an attacker who shares the key moves a victim's distributions, against the bound."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from jointkv.report.isolation_results import Attackers, Influence
from jointkv.report.markdown import NOT_MEASURED, number, table
from jointkv.report.pictures.base import Picture, colour, grid, kl_axis, legend_below, marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINEAR_KL = 1e-6
DRIFTS = {"logit_shift": "logit shift", "total_variation": "total variation", "kl": "KL of a row"}


class InfluenceOfAttackers(Picture[Influence]):
    """KL, changed top-1 tokens and attention rows against the bound."""

    name = "influence"
    reads = Influence

    def shows(self, result: Influence) -> bool:
        return bool(result.rows)

    def draw(self, results: Sequence[Influence]) -> Figure | None:
        rows = [row for result in results for row in result.rows]
        bounds, kinds = sorted({row.bound for row in rows}), list(dict.fromkeys(row.attacker for row in rows))
        figure, (divergence, changed, attention) = grid(3, 3, (4.4, 3.6))
        for place, kind in enumerate(kinds):
            style = {"color": colour(place), "marker": marker(place), "markersize": 5}
            groups = [_of(rows, bound, kind) for bound in bounds]
            worst = [max(value for row in group for value in row.kl) for group in groups]
            typical = [median(value for row in group for value in row.kl) for group in groups]
            tokens = [max(value for row in group for value in row.changed) for group in groups]
            divergence.plot(bounds, worst, label=f"{kind}, worst", **style)
            divergence.plot(bounds, typical, label=f"{kind}, median", linestyle="--", markerfacecolor="white", **style)
            changed.plot(bounds, tokens, **style)
        most = max(value for row in rows for value in row.kl)
        kl_axis(divergence, LINEAR_KL, most)
        divergence.set_ylabel("KL to the unfused victim (nats per token)")
        changed.set_ylabel("share of tokens with another top-1, worst")
        _draw_attention(attention, rows, bounds)
        for axes in (divergence, changed, attention):
            axes.set_xlabel("max_relative_error")
        legend_below(figure, 4)
        return figure

    def table(self, results: Sequence[Influence]) -> str:
        rows = [row for result in results for row in result.rows]
        keys = list(dict.fromkeys((row.bound, row.attacker) for row in rows))
        lines = [_line(bound, kind, _of(rows, bound, kind)) for bound, kind in sorted(keys, key=lambda key: key[0])]
        first = results[0]
        return (
            f"Model {first.model}. Attacker: real text or random tokens in front of the shared text, or the worst that "
            f"a search with {first.search_budget} evaluations per victim and bound found. KL in nats per token to the "
            "same victim unfused; worst: over victims and attackers. Attention rows: the largest bound computed from "
            "the errors made, and the largest that happened.\n\n"
            + table(("max_relative_error", "attacker"), NUMBERS, lines)
        )


NUMBERS = (
    "victims",
    "attackers",
    "served",
    "blocks, most",
    "KL, median",
    "KL, worst",
    "KL after one token, worst",
    "other top-1, worst",
    "block error, largest",
    "token error, largest",
    *(f"{text}: bound / actual" for text in DRIFTS.values()),
)


def _of(rows: Sequence[Attackers], bound: float, kind: str) -> list[Attackers]:
    return [row for row in rows if (row.bound, row.attacker) == (bound, kind)]


def _line(bound: float, kind: str, rows: Sequence[Attackers]) -> list[str]:
    kl = [value for row in rows for value in row.kl]
    blocks = [value for row in rows for value in row.blocks]
    return [
        f"{bound:g}",
        kind,
        str(len({row.victim for row in rows})),
        str(len(kl)),
        f"{sum(count > 0 for count in blocks) / len(blocks):.0%}",
        str(max(blocks)),
        f"{median(kl):.2g}",
        f"{max(kl):.2g}",
        f"{max(value for row in rows for value in row.kl_worst_token):.2g}",
        f"{max(value for row in rows for value in row.changed):.0%}",
        f"{max(value for row in rows for value in row.block_error):.3f}",
        f"{max(value for row in rows for value in row.token_error):.3f}",
        *(_pair(rows, name) for name in DRIFTS),
    ]


def _pair(rows: Sequence[Attackers], name: str) -> str:
    found = [row.rows[name] for row in rows if name in row.rows]
    if not found:
        return NOT_MEASURED
    bound, actual = max(each.bound for each in found), max(each.actual for each in found)
    return f"{number(bound, '.2g')} / {number(actual, '.2g')}" + (
        "" if all(each.holds for each in found) else " (broken)"
    )


def _draw_attention(axes: Axes, rows: Sequence[Attackers], bounds: Sequence[float]) -> None:
    measured = [row for row in rows if row.rows]
    if not measured:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])
        return
    shown = [bound for bound in bounds if any(row.bound == bound for row in measured)]
    for part, style in (("bound", "-"), ("actual", "--")):
        worst = [
            max(getattr(row.rows["total_variation"], part) for row in measured if row.bound == bound) for bound in shown
        ]
        axes.plot(shown, worst, style, color="0.3", marker="o", markersize=4, label=f"attention row, {part}")
    axes.set_ylabel("total variation of an attention row, worst")
    axes.set_ylim(0, None)
