"""What a user feels, at a glance: time to first token and output tokens per second of every arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jointkv.bench.result import Arm, Load
from jointkv.report.figure import colour, grid, legend_below
from jointkv.report.markdown import Columns
from jointkv.report.pictures.base import Picture
from jointkv.report.serving.metrics import OUTPUT_RATE, TTFT_P50, TTFT_P95, Metric
from jointkv.report.serving.pairs import arms_run, heading
from jointkv.report.serving.result import Serving, conditions

Row = tuple[Serving, Load, Arm]
PANELS = {"time to first token, s": (TTFT_P50, TTFT_P95), "output tokens per second": (OUTPUT_RATE,)}
NAME_FITS = 22
"""Characters of an arm's title that fit beside its bars."""


def _cell(metric: Metric) -> Callable[[Row], str]:
    return lambda row: metric.with_range(row[0].of(row[2].name, row[1].label))


class ServingArms(Picture[Serving]):
    """Two panels per result and load, bars of the medians by arm, lines from the least to the largest round."""

    name = "serving_arms"
    reads = Serving
    about = "Medians over the rounds, with the least and the largest."
    text: ClassVar[Columns[Any]] = {
        "traffic": lambda row: heading(row[0]),
        "load": lambda row: row[1].label,
        "arm": lambda row: row[2].title,
    }
    numbers: ClassVar[Columns[Any]] = {metric.title: _cell(metric) for metrics in PANELS.values() for metric in metrics}

    def rows(self, results: Sequence[Serving]) -> list[Row]:
        return [
            (result, load, arm)
            for result in results
            for load in result.loads
            for arm in result.arms
            if result.of(arm.name, load.label)
        ]

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        places = [(result, load) for result in results for load in result.loads if arms_run(result, load)]
        figure, panels = grid(len(PANELS) * len(places), len(PANELS), (4.6, 2.4), sharey="row")
        for row, (result, load) in enumerate(places):
            for column, (title, metrics) in enumerate(PANELS.items()):
                axes = panels[row * len(PANELS) + column]
                _draw_bars(axes, result, load, metrics)
                axes.set_xlabel(title)
        legend_below(figure, 2)
        return figure

    def conditions(self, result: Serving) -> Mapping[str, object]:
        return conditions(result)


def _names(arms: Sequence[Arm]) -> list[str]:
    """Titles of `arms` without their options, where these are not what tells them apart."""
    short = [", ".join(part for part in arm.title.split(", ") if "=" not in part) for arm in arms]
    return short if len(set(short)) == len(short) else [arm.title for arm in arms]


def _draw_bars(axes: Axes, result: Serving, load: Load, metrics: Sequence[Metric]) -> None:
    """A group of bars per arm, the first arm on top."""
    arms = [arm for arm in result.arms if result.of(arm.name, load.label)]
    height = 0.8 / len(metrics)
    for place, metric in enumerate(metrics):
        for at, arm in enumerate(arms):
            values = metric.samples(result.of(arm.name, load.label))
            if values:
                y = at + (place - (len(metrics) - 1) / 2) * height
                label = metric.short if at == 0 and len(metrics) > 1 else None
                axes.barh(y, median(values), 0.9 * height, color=colour(place), label=label)
                axes.hlines(y, min(values), max(values), color="black", linewidth=1)
                axes.annotate(
                    f"{median(values):{metric.form}}", (max(values), y), (4, 0), textcoords="offset points", va="center"
                )
    axes.set_yticks(range(len(arms)), [fill(name, NAME_FITS) for name in _names(arms)])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
