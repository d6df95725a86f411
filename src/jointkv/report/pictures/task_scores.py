"""What methods cost in task scores, against the unfused model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.markdown import NOT_MEASURED, table
from jointkv.report.pictures.base import Picture, grid
from jointkv.report.results import Evaluation, TaskScore

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TaskScores(Picture[Evaluation]):
    """Differences of mean scores with their intervals: a panel per task, a line per method and level."""

    name = "task_scores"
    reads = Evaluation

    def shows(self, result: Evaluation) -> bool:
        return bool(result.tasks)

    def draw(self, results: Sequence[Evaluation]) -> Figure | None:
        scores = [score for score in _scores(results) if score.difference is not None]
        if not scores:
            return None
        tasks = list(dict.fromkeys(score.task for score in scores))
        methods = list(dict.fromkeys(map(_method, scores)))[::-1]
        figure, panels = grid(len(tasks), 3, (4.2, 1.5 + 0.26 * len(methods)), sharey=True)
        for axes, task in zip(panels, tasks, strict=True):
            chosen = [score for score in scores if score.task == task]
            for score in chosen:
                difference = score.difference
                assert difference is not None
                place = methods.index(_method(score))
                axes.hlines(place, difference.low, difference.high, color="#1a73e8", linewidth=1.4)
                axes.plot(difference.mean, place, "o", color="#1a73e8", markersize=5)
            axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(methods)), methods, fontsize=9)
            axes.set_ylim(-0.6, len(methods) - 0.4)
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel(f"difference in {chosen[0].metric.replace('_', ' ')}", fontsize=9)
            axes.set_title(task + (" (stand-in data)" if any(score.stand_in for score in chosen) else ""), fontsize=10)
        return figure

    def table(self, results: Sequence[Evaluation]) -> str:
        return (
            f"Model {results[0].model}, {results[0].dtype}. Difference to the unfused model, paired by request, "
            "with its interval.\n\n" + table(WORDS, NUMBERS, map(_line, _scores(results)))
        )


WORDS = ("task", "metric", "method", "level", "source")
NUMBERS = ("examples", "mean", "difference")


def _line(score: TaskScore) -> list[str]:
    difference = score.difference
    return [
        score.task,
        score.metric,
        score.method,
        f"{score.level:g}",
        score.source + (" (stand-in)" if score.stand_in else ""),
        str(len(score.scores)) if score.scores else NOT_MEASURED,
        f"{score.mean:.3f}",
        NOT_MEASURED
        if difference is None
        else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
    ]


def _scores(results: Sequence[Evaluation]) -> list[TaskScore]:
    return [score for result in results for score in result.tasks]


def _method(score: TaskScore) -> str:
    return f"{score.method} {score.level:g}"
