"""How well an attacker tells whether a guessed text is resident, by what he looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jointkv.evaluate.record import Record
from jointkv.report.figure import colour, grid, key, legend_below, marker
from jointkv.report.markdown import NOT_MEASURED, Columns, number, table
from jointkv.report.pictures.base import Picture

CLOCK = ("cpu_ttft", "cpu_itl", "cpu_e2e", "cpu_gauge_ttft", "cpu_turn_ttft")
"""What is drawn: processor time. The time that passed, and what the server itself tells, stand in the table."""
GUESSES = {"exact": "the same prompt", "near": "the same text behind another first line"}


class ToldApart(Record):
    """One number that an attacker sees in one case.

    Attributes:
        varies: whether it had more than one value.
        found: whether the classes were told apart, at the file's level over all its tests.
    """

    arm: str
    scenario: str
    guess: str
    salts: str
    observable: str
    auc: float
    low: float
    high: float
    resident: int
    varies: bool
    found: bool


class SideChannel(Record):
    """What an attacker learns from timing and from what the server tells, as benchmarks/side_channel.py writes it.

    Attributes:
        observables: their meanings by name.
        tests, level, smallest_auc: tests that share the level, and the AUC that one of them finds in 8 of 10 runs.
    """

    format: Literal["jointkv.side_channel/1"] = "jointkv.side_channel/1"
    model: str
    observables: dict[str, str]
    tests: int
    level: float
    smallest_auc: float
    smallest_auc_single_test: float
    rows: list[ToldApart]


Row = tuple[SideChannel, ToldApart]
Case = tuple[str, str, str, str, str]
"""Model, arm, scenario, guess and salts."""


class SideChannelAUC(Picture[SideChannel]):
    """AUC with its interval: a panel per model, scenario and guess, a line per arm, a colour per observable."""

    name = "side_channel"
    reads = SideChannel

    def rows(self, results: Sequence[SideChannel]) -> list[Row]:
        return [(result, row) for result in results for row in result.rows]

    def draw(self, results: Sequence[SideChannel]) -> Figure | None:
        panels: dict[tuple[str, str, str], list[Row]] = {}
        for result, row in self.rows(results):
            panels.setdefault((result.model, row.scenario, row.guess), []).append((result, row))
        arms = list(dict.fromkeys(row.arm for _, row in self.rows(results)))[::-1]
        figure, all_axes = grid(len(panels), 2, (5.6, 0.9 + 0.52 * len(arms)), sharey=True, sharex=True)
        for axes, ((model, scenario, guess), rows) in zip(all_axes, panels.items(), strict=True):
            for _, row in rows:
                _draw_row(axes, row, arms.index(row.arm))
            axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
            smallest = rows[0][0].smallest_auc
            axes.axvspan(1 - smallest, smallest, color="0.93", zorder=0)
            axes.set_yticks(range(len(arms)), arms, fontsize=9)
            axes.set_ylim(-0.6, len(arms) - 0.4)
            axes.set_xlim(-0.03, 1.03)
            axes.set_title(f"{model}, {scenario}, guess: {GUESSES.get(guess, guess)}")
        for axes in all_axes[-2:]:
            axes.set_xlabel("AUC of the engine's processor time (below 0.5: faster if resident)")
        handles = [key(name, color=colour(place), marker=marker(place)) for place, name in enumerate(CLOCK)]
        hollow = key("different salts", color="0.3", marker="o", markerfacecolor="white")
        legend_below(figure, 4, [*handles, hollow, Patch(color="0.93", label="found in less than 8 of 10 runs")])
        return figure

    def table(self, results: Sequence[SideChannel]) -> str:
        cases: dict[Case, dict[str, ToldApart]] = {}
        for result, row in self.rows(results):
            case = cases.setdefault((result.model, row.arm, row.scenario, row.guess, row.salts), {})
            case[row.observable] = row
        names = list(dict.fromkeys(name for case in cases.values() for name in case))
        numbers: Columns[tuple[Case, dict[str, ToldApart]]] = {
            name: lambda case, name=name: _auc(case[1].get(name))  # type: ignore[misc]
            for name in names
        }
        meanings = {name: text for result in results for name, text in result.observables.items()}
        found = "; ".join(
            f"{result.model}: {result.tests} tests share the level {result.level:g}, AUC found in 8 of 10 runs from "
            f"{result.smallest_auc:.2f} (a single test: {result.smallest_auc_single_test:.2f})"
            for result in results
        )
        trials = sorted({row.resident for _, row in self.rows(results)})
        counts = " to ".join(str(count) for count in dict.fromkeys((trials[0], trials[-1])))
        return (
            "AUC with its 95% interval: the chance that the number is larger when the guess is resident than when it "
            "is not. 0.5 tells nothing; below 0.5 it is smaller. **Bold**: told apart after correction for the number "
            f"of tests. {NOT_MEASURED}: always the same number, or not seen in this scenario. {found}. Trials of each "
            f"class and case: {counts}.\n\n"
            + table(TEXT, numbers, cases.items())
            + "".join(f"\n- {name}: {meanings[name]}" for name in names if name in meanings)
            + "\n"
        )


TEXT: Columns[tuple[Case, dict[str, ToldApart]]] = {
    name: lambda case, place=place: case[0][place]  # type: ignore[misc]
    for place, name in enumerate(("model", "arm", "scenario", "guess", "salts"))
}


def _auc(row: ToldApart | None) -> str:
    if row is None or not row.varies:
        return NOT_MEASURED
    text = number(row.auc, ".2f", row.low, row.high)
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
