"""How far an attacker who shares the key moves a victim's distributions, against the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field

from jointkv.evaluate.record import Record
from jointkv.report.figure import colour, grid, kl_axis, legend_below, marker
from jointkv.report.markdown import NOT_MEASURED, Columns, table
from jointkv.report.pictures.base import Picture

DRIFTS = {"logit_shift": "logit shift", "total_variation": "total variation", "kl": "KL of a row"}


class RowBound(Record):
    """The largest bound on an attention row, and the largest that happened."""

    bound: float
    actual: float
    holds: bool


class Attackers(Record):
    """What some attackers did to one victim under one bound; lists hold one entry per attacker."""

    victim: int
    bound: float
    attacker: str
    kl: list[float]
    kl_worst_token: list[float]
    changed: list[float]
    blocks: list[int]
    block_error: list[float]
    token_error: list[float]
    rows: dict[str, RowBound] = Field(default_factory=dict)


class Influence(Record):
    """How far one tenant's content moved another's next-token distributions, as benchmarks/influence.py writes it."""

    format: Literal["jointkv.influence/1"] = "jointkv.influence/1"
    model: str
    search_budget: int
    rows: list[Attackers]


class InfluenceOfAttackers(Picture[Influence]):
    """KL, changed top-1 tokens and attention rows against the bound."""

    name = "influence"
    reads = Influence

    def rows(self, results: Sequence[Influence]) -> list[Attackers]:
        return sorted((row for result in results for row in result.rows), key=lambda row: row.bound)

    def draw(self, results: Sequence[Influence]) -> Figure | None:
        rows = self.rows(results)
        figure, (divergence, changed, attention) = grid(3, 3, (4.4, 3.6))
        kinds: dict[str, list[Group]] = {}
        for group in _groups(rows):
            kinds.setdefault(group[0].attacker, []).append(group)
        for place, (kind, groups) in enumerate(kinds.items()):
            look = {"color": colour(place), "marker": marker(place), "markersize": 5}
            bounds = [group[0].bound for group in groups]
            typical = [median(_all(group, "kl")) for group in groups]
            divergence.plot(bounds, [max(_all(group, "kl")) for group in groups], label=f"{kind}, worst", **look)
            divergence.plot(bounds, typical, "--", markerfacecolor="white", label=f"{kind}, median", **look)
            changed.plot(bounds, [max(_all(group, "changed")) for group in groups], **look)
        kl_axis(divergence, max(_all(rows, "kl")))
        divergence.set_ylabel("KL to the unfused victim (nats per token)")
        changed.set_ylabel("share of tokens with another top-1, worst")
        _draw_attention(attention, rows)
        for axes in (divergence, changed, attention):
            axes.set_xlabel("max_relative_error")
        legend_below(figure, 4)
        return figure

    def table(self, results: Sequence[Influence]) -> str:
        return (
            f"Model {results[0].model}. Attacker: real text or random tokens in front of the shared text, or the worst "
            f"that a search with {results[0].search_budget} evaluations per victim and bound found. KL in nats per "
            "token to the same victim unfused; worst: over victims and attackers. Attention rows: the largest bound "
            "computed from the errors made, and the largest that happened.\n\n"
            + table(TEXT, NUMBERS, _groups(self.rows(results)))
        )

    def conditions(self, result: Influence) -> Mapping[str, object]:
        return {"model": result.model}


Group = list[Attackers]
"""Rows of one bound and one kind of attacker."""
TEXT: Columns[Group] = {
    "max_relative_error": lambda group: f"{group[0].bound:g}",
    "attacker": lambda group: group[0].attacker,
}
NUMBERS: Columns[Group] = {
    "victims": lambda group: str(len({row.victim for row in group})),
    "attackers": lambda group: str(len(_all(group, "kl"))),
    "served": lambda group: f"{sum(count > 0 for count in _all(group, 'blocks')) / len(_all(group, 'blocks')):.0%}",
    "blocks, most": lambda group: str(max(_all(group, "blocks"))),
    "KL, median": lambda group: f"{median(_all(group, 'kl')):.2g}",
    "KL, worst": lambda group: f"{max(_all(group, 'kl')):.2g}",
    "KL after one token, worst": lambda group: f"{max(_all(group, 'kl_worst_token')):.2g}",
    "other top-1, worst": lambda group: f"{max(_all(group, 'changed')):.0%}",
    "block error, largest": lambda group: f"{max(_all(group, 'block_error')):.3f}",
    "token error, largest": lambda group: f"{max(_all(group, 'token_error')):.3f}",
    **{
        f"{words}: bound / actual": lambda group, name=name: _drift(group, name)  # type: ignore[misc]
        for name, words in DRIFTS.items()
    },
}


def _groups(rows: Sequence[Attackers]) -> list[Group]:
    groups: dict[tuple[float, str], Group] = {}
    for row in rows:
        groups.setdefault((row.bound, row.attacker), []).append(row)
    return list(groups.values())


def _all(rows: Sequence[Attackers], field: str) -> list[float]:
    return [value for row in rows for value in getattr(row, field)]


def _drift(group: Group, name: str) -> str:
    found = [row.rows[name] for row in group if name in row.rows]
    if not found:
        return NOT_MEASURED
    bound, actual = max(each.bound for each in found), max(each.actual for each in found)
    return f"{bound:.2g} / {actual:.2g}{'' if all(each.holds for each in found) else ' (broken)'}"


def _draw_attention(axes: Axes, rows: Sequence[Attackers]) -> None:
    worst: dict[float, list[RowBound]] = {}
    for row in rows:
        if "total_variation" in row.rows:
            worst.setdefault(row.bound, []).append(row.rows["total_variation"])
    for part, line in (("bound", "-"), ("actual", "--")):
        values = [max(getattr(each, part) for each in found) for found in worst.values()]
        axes.plot(list(worst), values, line, color="0.3", marker="o", markersize=4, label=f"attention row, {part}")
    axes.set_ylabel("total variation of an attention row, worst")
    if not worst:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
    axes.set_ylim(bottom=0)
