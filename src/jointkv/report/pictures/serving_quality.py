"""What an arm gives beside what it does to answers: tokens per second against KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, ClassVar

from matplotlib.figure import Figure

from jointkv.bench.result import Arm, Load
from jointkv.bench.scores import Scored, TrueAnswers
from jointkv.report.figure import colour, grid, kl_axis, legend_below, marker
from jointkv.report.markdown import Columns, number
from jointkv.report.pictures.base import Picture
from jointkv.report.serving.metrics import (
    E2EL_P50,
    ITL_P50,
    ITL_P95,
    OUTPUT_RATE,
    PAGES_FREED,
    RUNNING_PEAK,
    SECONDS,
    TTFT_P50,
    TTFT_P95,
    Metric,
)
from jointkv.report.serving.pairs import arms_run, called, heading
from jointkv.report.serving.result import Serving, conditions

Row = tuple[Serving, Load, Arm]
SPEED: tuple[Metric, ...] = (
    *(OUTPUT_RATE, TTFT_P50, TTFT_P95, ITL_P50, ITL_P95, E2EL_P50, SECONDS, RUNNING_PEAK, PAGES_FREED),
)


def _median(metric: Metric) -> Callable[[Row], str]:
    return lambda row: metric.median(row[0].of(row[2].name, row[1].label))


def _score(row: Row) -> Scored | None:
    return next((each for each in row[0].scores or () if each.arm == row[2].name), None)


def _truth(row: Row) -> TrueAnswers | None:
    result, load, arm = row
    return next((each for each in result.true_answers if (each.arm, each.load) == (arm.name, load.label)), None)


def _scored(field: str, form: str) -> Any:
    return lambda row: number(None if (found := _score(row)) is None else getattr(found, field), form)


def _f1(row: Row) -> str:
    found = _truth(row)
    return number(None if found is None else found.f1, ".3f")


class ServingQuality(Picture[Serving]):
    """A panel per result and load that has scores, a dot per arm; the reference lies at KL 0."""

    name = "serving_quality"
    reads = Serving
    about = (
        "Medians over the rounds, and how far the distributions of an arm that gives the reference arm's answers are "
        "from the reference's: KL in nats, mean over tokens and of the worst request; equal likeliest tokens."
    )
    text: ClassVar[Columns[Any]] = {
        "traffic": lambda row: heading(row[0]),
        "load": lambda row: row[1].label,
        "arm": lambda row: called(row[2]),
    }
    numbers: ClassVar[Columns[Any]] = {
        **{metric.title: _median(metric) for metric in SPEED},
        "KL": _scored("kl", ".2g"),
        "KL, worst request": _scored("kl_worst_request", ".2g"),
        "top-1": _scored("top1", ".1%"),
        "top-1, worst request": _scored("top1_worst_request", ".1%"),
        "F1": _f1,
    }

    def rows(self, results: Sequence[Serving]) -> list[Row]:
        return [
            (result, load, arm)
            for result in results
            if result.scores
            for load in result.loads
            for arm in arms_run(result, load)
        ]

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        places = list(dict.fromkeys((results.index(result), load) for result, load, _ in self.rows(results)))
        figure, panels = grid(len(places), 2, (4.6, 3.4), "KL (nats)")
        looks: dict[str, dict[str, str]] = {}
        for axes, (place, load) in zip(panels, places, strict=True):
            result, worst = results[place], 0.0
            for arm in arms_run(result, load):
                look = looks.setdefault(arm.name, {"color": colour(len(looks)), "marker": marker(len(looks))})
                found = _score((result, load, arm))
                kl = 0.0 if found is None else found.kl
                speed = median(OUTPUT_RATE.samples(result.of(arm.name, load.label)))
                axes.plot([speed], [kl], linestyle="", label=called(arm), **look)
                worst = max(worst, kl)
            kl_axis(axes, worst)
            axes.set_xlim(left=0)
            axes.set_xlabel(OUTPUT_RATE.title)
            axes.set_title(f"{heading(result)}, {load.label}")
        legend_below(figure, 3)
        return figure

    def conditions(self, result: Serving) -> Mapping[str, object]:
        return conditions(result)
