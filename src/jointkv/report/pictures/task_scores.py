"""What methods cost in task scores, against the unfused model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from jointkv.evaluate.compare.result import Evaluation
from jointkv.evaluate.score.bootstrap import Interval
from jointkv.evaluate.tasks.result import TaskRow
from jointkv.report.figure import colour, grid
from jointkv.report.markdown import NOT_MEASURED, Columns, number, table
from jointkv.report.pictures.base import Picture, source
from jointkv.report.pictures.kl_against_bytes import KLAgainstBytes

NARROWEST = 0.05
"""Differences on either side of 0 that an axis has at least: of scores that are all equal it would show rounding."""


def interval_cell(found: Interval | None, form: str) -> str:
    """A mean with its interval."""
    return NOT_MEASURED if found is None else number(found.mean, form, found.low, found.high)


class TaskScores(Picture[Evaluation]):
    """Differences of mean scores with their intervals: a panel per task, a line per method and level."""

    name = "task_scores"
    reads = Evaluation

    def rows(self, results: Sequence[Evaluation]) -> list[TaskRow]:
        return [score for result in results for score in result.tasks]

    def draw(self, results: Sequence[Evaluation]) -> Figure | None:
        known = [(score, score.difference) for score in self.rows(results) if score.difference is not None]
        if not known:
            return None
        tasks = list(dict.fromkeys(score.task for score, _ in known))
        methods = list(dict.fromkeys(f"{score.method} {score.level:g}" for score, _ in known))[::-1]
        figure, panels = grid(len(tasks), 3, (4.2, 1.5 + 0.26 * len(methods)), sharey=True)
        for axes, task in zip(panels, tasks, strict=True):
            chosen = [(score, difference) for score, difference in known if score.task == task]
            for score, difference in chosen:
                place = methods.index(f"{score.method} {score.level:g}")
                axes.hlines(place, difference.low, difference.high, color=colour(0), linewidth=1.4)
                axes.plot(difference.mean, place, "o", color=colour(0), markersize=5)
            if all(
                -NARROWEST < end < NARROWEST for _, difference in chosen for end in (difference.low, difference.high)
            ):
                axes.set_xlim(-NARROWEST, NARROWEST)
            axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(methods)), methods, fontsize=9)
            axes.set_ylim(-0.6, len(methods) - 0.4)
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel(f"difference in {chosen[0][0].metric.replace('_', ' ')}", fontsize=9)
            axes.set_title(task + (" (stand-in data)" if any(score.stand_in for score, _ in chosen) else ""))
        return figure

    def table(self, results: Sequence[Evaluation]) -> str:
        rows = self.rows(results)
        chosen = [row for row in rows if row.margins]
        numbers = {**NUMBERS, **(OF_PREFILL if any(row.work is not None for row in rows) else {})}
        return (
            f"Model {results[0].model}, {results[0].dtype}. Difference to the unfused model, paired by request, "
            "with its interval.\n\n" + table(TEXT, numbers, rows) + (f"\n{CHOICES}\n\n" if chosen else "")
        ) + (table({name: TEXT[name] for name in ("task", "method", "level")}, OF_CHOICES, chosen) if chosen else "")

    def conditions(self, result: Evaluation) -> Mapping[str, object]:
        return KLAgainstBytes().conditions(result)


CHOICES = (
    "Answers to choose from, by their log-probabilities per token: the margin of the right one over the best wrong one "
    "in nats, and how many stand in another order than the unfused model has them in."
)
TEXT: Columns[TaskRow] = {
    "task": lambda score: score.task,
    "metric": lambda score: score.metric,
    "method": lambda score: score.method,
    "level": lambda score: f"{score.level:g}",
    "source": source,
}
NUMBERS: Columns[TaskRow] = {
    "examples": lambda score: str(len(score.scores)) if score.scores else NOT_MEASURED,
    "mean": lambda score: f"{score.mean:.3f}",
    "difference": lambda score: interval_cell(score.difference, "+.3f"),
}
OF_PREFILL: Columns[TaskRow] = {
    "computed": lambda score: NOT_MEASURED if score.work is None else f"{score.work.computed_share:.1%}",
    "skipped": lambda score: NOT_MEASURED if score.work is None else f"{score.work.skipped_share:.1%}",
}
OF_CHOICES: Columns[TaskRow] = {
    "margin": lambda score: f"{fmean(score.margins):+.3f}",
    "difference": lambda score: interval_cell(score.margin_difference, "+.3f"),
    "orders changed": lambda score: interval_cell(score.flipped_orders, ".1%"),
    "pairs changed": lambda score: interval_cell(score.flipped_pairs, ".1%"),
}
