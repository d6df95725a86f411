"""Charts of serving results, drawn on given axes: a colour and a marker per arm, every sample as a point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import median
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes

from jointkv.bench.result import Arm, Load, ServingResult
from jointkv.report.figure import colour, log_axis, marker, plain_ticks
from jointkv.report.serving.metrics import Metric
from jointkv.report.serving.pairs import arms_run, called, heading, ratio
from jointkv.report.serving.verdict import LEAST, Effect, Verdict

Looks = Mapping[str, Mapping[str, Any]]
"""Colour and marker by name."""
Samples = Callable[[Arm, Load], Sequence[float]]
BAND = "#ececec"
POINT = {"linestyle": "", "markersize": 4.5, "alpha": 0.55, "markeredgewidth": 0}
PRESSURES = {
    "usage": "pool in use at the peak without fusion, %",
    "waiting": "requests waiting without fusion, mean",
    "demand": "pages the load takes in a large pool ÷ pages of this pool",
}
"""How short memory was, in three measures."""
LABELS_FIT = 14
"""Characters of a load's name that fit under its samples."""


def styles(names: Sequence[str]) -> Looks:
    """Colour and marker by name, the same in all charts that are given the same names."""
    return {name: {"color": colour(at), "marker": marker(at)} for at, name in enumerate(dict.fromkeys(names))}


def draw_levels(axes: Axes, result: ServingResult, metric: Metric, looks: Looks) -> None:
    """A metric by load and arm: a point per round, a bar at the median."""
    _draw_by_load(axes, result, result.arms, lambda arm, load: metric.samples(result.of(arm.name, load.label)), looks)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(metric.title)
    axes.grid(axis="y")


def draw_ratios(
    axes: Axes, result: ServingResult, uppers: Sequence[Arm], lower: Arm, metric: Metric, looks: Looks
) -> None:
    """The metric of `uppers` over that of `lower`, likewise."""
    _ratio_ground(
        axes,
        _draw_by_load(axes, result, uppers, lambda arm, load: ratio(result, arm, lower, load, metric).rounds, looks),
    )
    better = {True: " (more is better)", False: " (less is better)", None: ""}[metric.higher_is_better]
    axes.set_ylabel(f"÷ {called(lower)}{better}")


def _draw_by_load(
    axes: Axes, result: ServingResult, arms: Sequence[Arm], samples: Samples, looks: Looks
) -> list[float]:
    """`samples` of each arm beside those of the others, for every load; returns all that was drawn."""
    loads = [load for load in result.loads if arms_run(result, load)]
    drawn: list[float] = []
    for at, load in enumerate(loads):
        for place, arm in enumerate(arms):
            values = samples(arm, load)
            if values:
                x = at + 0.7 * ((place + 0.5) / len(arms) - 0.5)
                axes.plot([x] * len(values), values, **POINT, **looks[arm.name])
                half = 0.25 / len(arms)
                axes.hlines(median(values), x - half, x + half, color=looks[arm.name]["color"], linewidth=2.2)
                drawn.extend(values)
    axes.set_xticks(range(len(loads)), [fill(load.label, LABELS_FIT) for load in loads])
    axes.set_xlim(-0.5, len(loads) - 0.5)
    return drawn


def draw_break_even(
    axes: Axes, found: Sequence[tuple[Verdict, Effect]], metric: Metric, across: str, looks: Looks
) -> None:
    """The ratio of a metric against how short memory was, in one of `PRESSURES`; `looks` by `heading`."""
    drawn, places = [1.0], [2.0]
    for verdict, effect in found:
        x = effect.demand if across == "demand" else getattr(effect.pressure, across)
        each = effect.ratios[metric]
        if x is None or each.median is None:
            continue
        x = 100 * x if across == "usage" else x
        look = looks[heading(verdict.result)]
        axes.vlines(x, min(each.rounds), max(each.rounds), color=look["color"], linewidth=1, alpha=0.6)
        axes.plot(x, each.median, markersize=6, linestyle="", **look)
        axes.plot([x] * len(each.rounds), each.rounds, markersize=3, alpha=0.5, linestyle="", **look)
        drawn.extend(each.rounds)
        places.append(x)
    _ratio_ground(axes, drawn)
    axes.set_ylabel(f"{metric.short}, ratio")
    axes.set_xlabel(PRESSURES[across])
    if across == "waiting":
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        plain_ticks(axes.xaxis)
        axes.set_xlim(-0.15, 1.4 * max(places))


def _ratio_ground(axes: Axes, drawn: Sequence[float]) -> None:
    """A logarithmic axis around 1 with a line there and the band that counts as no difference."""
    axes.axhspan(1 - LEAST, 1 + LEAST, color=BAND, linewidth=0, zorder=0)
    axes.axhline(1, linewidth=0.8, color="0.5", zorder=1)
    axes.grid(axis="y")
    log_axis(axes, "y", min(*drawn, 0.9, 1.1), max(*drawn, 0.9, 1.1))


def draw_ttft(axes: Axes, result: ServingResult, load: Load, looks: Looks) -> None:
    """Part of the requests that had their first token by a time: all rounds together, and each round in thin lines."""
    for arm in result.arms:
        hue = looks[arm.name]["color"]
        rounds = [[request.ttft for request in run.requests] for run in result.of(arm.name, load.label)]
        rounds = [times for times in rounds if times]
        for times in rounds:
            axes.ecdf(times, color=hue, linewidth=0.6, alpha=0.45)
        if rounds:
            axes.ecdf(list(chain(*rounds)), color=hue, linewidth=1.9)
    axes.set_xlim(left=0)
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("part of the requests")
    axes.grid()


def draw_timelines(panels: Sequence[Axes], result: ServingResult, load: Load, looks: Looks) -> None:
    """Pages in use, running, waiting, pages freed and prompt tokens skipped over time; the first round in a thick line.

    Of these as many as there are `panels`.
    """
    for arm in result.arms:
        for number, run in enumerate(result.of(arm.name, load.label)):
            look = {"linewidth": 0.7, "alpha": 0.4} if number else {"linewidth": 1.5}
            line = run.timeline
            used = [usage * arm.pool_blocks for usage in line.pool_usage]
            drawn = (used, line.running, line.waiting, line.pages_freed, line.prompt_tokens_skipped)
            for axes, values in zip(panels, drawn, strict=False):
                if values is not None:
                    axes.plot(line.seconds, values, color=looks[arm.name]["color"], **look)
    names = ("pages in use", "running", "waiting", "pages freed", "tokens skipped")
    for axes, name in zip(panels, names, strict=False):
        axes.set_ylabel(name)
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        axes.grid(axis="y")
        axes.locator_params(axis="y", nbins=4)
    panels[-1].set_xlabel("seconds since the start of the run")
