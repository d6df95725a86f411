"""How well an attacker tells whether a guessed text is resident, by what he looks at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.isolation_results import SideChannel, ToldApart
from jointkv.report.markdown import NOT_MEASURED, table
from jointkv.report.pictures.base import Picture, colour, grid, legend_below, marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOCK = ("cpu_ttft", "cpu_itl", "cpu_e2e", "cpu_gauge_ttft", "cpu_turn_ttft")
"""What is drawn: processor time. The time that passed, and what the server itself tells, stand in the table."""
GUESSES = {"exact": "the same prompt", "near": "the same text behind another first line"}
Case = tuple[str, str, str]


class SideChannelAUC(Picture[SideChannel]):
    """AUC with its interval: a panel per model, scenario and guess, a line per arm, a colour per observable."""

    name = "side_channel"
    reads = SideChannel

    def shows(self, result: SideChannel) -> bool:
        return bool(result.rows)

    def draw(self, results: Sequence[SideChannel]) -> Figure | None:
        panels = [
            (result, scenario, guess)
            for result in results
            for scenario, guess in dict.fromkeys((row.scenario, row.guess) for row in result.rows)
        ]
        arms = list(dict.fromkeys(row.arm for result in results for row in result.rows))[::-1]
        figure, all_axes = grid(len(panels), 2, (5.6, 0.9 + 0.52 * len(arms)), sharey=True, sharex=True)
        for axes, (result, scenario, guess) in zip(all_axes, panels, strict=True):
            chosen = [row for row in result.rows if (row.scenario, row.guess) == (scenario, guess)]
            for row in chosen:
                _draw_row(axes, row, arms.index(row.arm))
            axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
            smallest = result.smallest_auc
            axes.axvspan(1 - smallest, smallest, color="0.93", zorder=0)
            axes.set_yticks(range(len(arms)), arms, fontsize=9)
            axes.set_ylim(-0.6, len(arms) - 0.4)
            axes.set_xlim(-0.03, 1.03)
            axes.set_title(f"{result.model}, {scenario}, guess: {GUESSES.get(guess, guess)}", fontsize=10)
        for axes in all_axes[-2:]:
            axes.set_xlabel("AUC of the engine's processor time (below 0.5: faster if resident)")
        legend_below(figure, 4, _handles())
        return figure

    def table(self, results: Sequence[SideChannel]) -> str:
        names = list(dict.fromkeys(row.observable for result in results for row in result.rows))
        lines = [
            [result.model, *case, *_cells(rows, names)] for result in results for case, rows in _by_case(result).items()
        ]
        meanings = {name: text for result in results for name, text in result.observables.items()}
        found = "; ".join(
            f"{result.model}: {result.tests} tests share the level {result.level:g}, AUC found in 8 of 10 runs from "
            f"{result.smallest_auc:.2f} (a single test: {result.smallest_auc_single_test:.2f})"
            for result in results
        )
        return (
            "AUC with its 95% interval: the chance that the number is larger when the guess is resident than when it "
            "is not. 0.5 tells nothing; below 0.5 it is smaller. **Bold**: told apart after correction for the number "
            f"of tests. {NOT_MEASURED}: always the same number, or not seen in this scenario. {found}. Trials of each "
            f"class and case: {_counts(results)}.\n\n"
            + table(("model", "arm", "scenario", "guess", "salts"), names, lines)
            + "".join(f"\n- {name}: {meanings[name]}" for name in names if name in meanings)
            + "\n"
        )


def _counts(results: Sequence[SideChannel]) -> str:
    found = sorted({row.resident for result in results for row in result.rows})
    return " to ".join(str(count) for count in dict.fromkeys((found[0], found[-1])))


def _by_case(result: SideChannel) -> dict[tuple[str, str, str, str], list[ToldApart]]:
    found: dict[tuple[str, str, str, str], list[ToldApart]] = {}
    for row in result.rows:
        found.setdefault((row.arm, row.scenario, row.guess, row.salts), []).append(row)
    return found


def _cells(rows: Sequence[ToldApart], names: Sequence[str]) -> list[str]:
    seen = {row.observable: row for row in rows if row.varies}
    return [_cell(seen[name]) if name in seen else NOT_MEASURED for name in names]


def _cell(row: ToldApart) -> str:
    text = f"{row.auc:.2f} [{row.low:.2f}, {row.high:.2f}]"
    return f"**{text}**" if row.found else text


def _draw_row(axes: Axes, row: ToldApart, line: int) -> None:
    if row.observable not in CLOCK or not row.varies:
        return
    place = CLOCK.index(row.observable)
    salted = row.salts != "none"
    height = line + 0.32 - 0.14 * place - (0.06 if salted else 0.0)
    hue = colour(place)
    axes.hlines(height, row.low, row.high, color=hue, linewidth=0.9, alpha=0.4 if salted else 1.0)
    face = "white" if salted else hue
    axes.plot(row.auc, height, marker(place), color=hue, markersize=4.5, markerfacecolor=face, zorder=3)


def _handles() -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [
        Line2D([], [], color=colour(place), marker=marker(place), linestyle="", label=name)
        for place, name in enumerate(CLOCK)
    ]
    hollow = Line2D([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="", label="different salts")
    return list(itertools.chain(kinds, [hollow, Patch(color="0.93", label="found in less than 8 of 10 runs")]))
