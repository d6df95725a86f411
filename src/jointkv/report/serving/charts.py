"""Charts of serving results, drawn on given axes: a colour and a marker per arm, every sample as a point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, Any

from jointkv.bench.result import Arm, Load, Run, ServingResult
from jointkv.report.pictures.base import colour, marker
from jointkv.report.serving.break_even import Point, heading
from jointkv.report.serving.metrics import Metric
from jointkv.report.serving.pairs import called, ratio
from jointkv.report.serving.verdict import LEAST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Style = Mapping[str, Any]
LIGHT, BAND = "#d9d9d9", "#ececec"
FAMILIES = {
    "closed": "requests under way (closed loop)",
    "poisson": "requests sent per second (Poisson)",
    "bursty": "requests sent per second (bursty)",
    "replay": "speed of the replay",
}
RATIO_TICKS = {
    1.5: (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4),
    4: (0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3),
    12: (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 8),
    1000: (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
    math.inf: (1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6),
}
"""Marks on an axis whose ends have a ratio up to the key."""
NAMES_FIT = 14
"""Characters of an arm's name that fit under a category."""


def arm_styles(results: Sequence[ServingResult]) -> dict[str, Style]:
    """Colour and marker of every arm by name, the same in all charts of `results`."""
    names = dict.fromkeys(arm.name for result in results for arm in result.arms)
    return {name: {"color": colour(place), "marker": marker(place)} for place, name in enumerate(names)}


def families(result: ServingResult) -> list[list[Load]]:
    """The loads in groups that share an axis: of one kind, and of one burstiness."""
    groups: dict[tuple[str, float | None], list[Load]] = {}
    for load in result.loads:
        groups.setdefault((load.kind, load.burstiness), []).append(load)
    return [sorted(loads, key=position) for loads in groups.values()]


def position(load: Load) -> float:
    """Where the load lies on the axis of its family."""
    return float(next(value for value in (load.concurrency, load.rate, load.speed, 1.0) if value is not None))


def draw_levels(
    axes: Axes, result: ServingResult, loads: Sequence[Load], metric: Metric, styles: Mapping[str, Style]
) -> None:
    """A metric against the load, or against the arm if there is one load: all samples, and their medians in lines."""
    arms = [arm for arm in result.arms if any(result.of(arm.name, load.label) for load in loads)]
    for place, arm in enumerate(arms):
        samples = [(position(load), metric.samples(result.of(arm.name, load.label))) for load in loads]
        if len(loads) == 1:
            samples = [(float(place), values) for _, values in samples]
        _draw_samples(axes, [(x, values) for x, values in samples if values], arm, styles[arm.name], len(loads) == 1)
    if len(loads) == 1:
        axes.set_xticks(range(len(arms)), [fill(called(arm), NAMES_FIT) for arm in arms])
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.set_xlabel(loads[0].label)
    else:
        _load_axis(axes, loads)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(metric.title)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_samples(axes: Axes, samples: list[tuple[float, list[float]]], arm: Arm, style: Style, single: bool) -> None:
    for x, values in samples:
        axes.plot([x] * len(values), values, linestyle="", markersize=4.5, alpha=0.55, markeredgewidth=0, **style)
        if single:
            axes.hlines(median(values), x - 0.3, x + 0.3, color=style["color"], linewidth=2.2)
    if not single:
        middles = [(x, median(values)) for x, values in samples]
        axes.plot(*zip(*middles, strict=True), color=style["color"], linewidth=1.8, label=arm.title)


def _load_axis(axes: Axes, loads: Sequence[Load]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    places = [position(load) for load in loads]
    if max(places) > 4 * min(places) > 0:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(FAMILIES[loads[0].kind])


def draw_ratios(
    axes: Axes,
    result: ServingResult,
    uppers: Sequence[Arm],
    lower: Arm,
    metric: Metric,
    styles: Mapping[str, Style],
) -> None:
    """The metric of `uppers` over that of `lower`: a line per load, a point per round, a bar at the median."""
    rows = [load for load in result.loads if result.of(lower.name, load.label)]
    ends = [1.0]
    for line, load in enumerate(rows):
        for place, arm in enumerate(uppers):
            found = ratio(result, arm, lower, load, metric)
            if found.median is None:
                continue
            height = line + 0.5 * ((place + 0.5) / len(uppers) - 0.5)
            style = styles[arm.name]
            axes.plot(found.rounds, [height] * len(found.rounds), linestyle="", markersize=4.5, alpha=0.6, **style)
            axes.plot([found.median] * 2, [height - 0.11, height + 0.11], color=style["color"], linewidth=2.4)
            ends.extend(found.rounds)
    _ratio_ground(axes, "x", ends)
    axes.set_yticks(range(len(rows)), [load.label for load in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    better = {True: " (more is better)", False: " (less is better)", None: ""}[metric.higher_is_better]
    axes.set_xlabel(f"{metric.short} ÷ {called(lower)}{better}")


def draw_break_even(axes: Axes, found: Sequence[Point], metric: Metric, across: str) -> None:
    """The ratio of a metric against how short memory was: `across` is `usage`, `waiting` or `demand`."""
    from matplotlib.ticker import StrMethodFormatter

    groups: dict[str, list[Point]] = {}
    for point in found:
        groups.setdefault(heading(point.result, point.verdict), []).append(point)
    ends = [1.0]
    for place, (name, points) in enumerate(groups.items()):
        style = {"color": colour(place), "marker": marker(place)}
        for number, point in enumerate(points):
            x = point.demand if across == "demand" else getattr(point.pressure, across)
            each = point.effect.ratios[metric.name]
            if x is None or each.median is None:
                continue
            x = 100 * x if across == "usage" else x
            axes.vlines(x, min(each.rounds), max(each.rounds), color=style["color"], linewidth=1, alpha=0.6)
            label = name if number == 0 else None
            axes.plot(x, each.median, markersize=6, linestyle="", label=label, **style)
            axes.plot([x] * len(each.rounds), each.rounds, markersize=3, alpha=0.5, linestyle="", **style)
            ends.extend(each.rounds)
    _ratio_ground(axes, "y", ends)
    axes.set_ylabel(f"{metric.short}, ratio")
    axes.set_xlabel(
        {
            "usage": "pool in use at the peak without fusion, %",
            "waiting": "requests waiting without fusion, mean",
            "demand": "pages the load takes in a large pool ÷ pages of this pool",
        }[across]
    )
    if across == "waiting":
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlim(-0.15, 1.4 * max([2.0, *(point.pressure.waiting for point in found)]))


def _ratio_ground(axes: Axes, which: str, ends: Sequence[float]) -> None:
    """A logarithmic axis around 1 with a line there and the band that counts as no difference."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    span, line = (axes.axvspan, axes.axvline) if which == "x" else (axes.axhspan, axes.axhline)
    span(1 - LEAST, 1 + LEAST, color=BAND, linewidth=0, zorder=0)
    line(1, linewidth=0.8, color="0.5", zorder=1)
    axes.grid(axis=which, color=LIGHT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    low, high = min(*ends, 0.9) / 1.06, max(*ends, 1.1) * 1.06
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    ticks = next(ticks for reach, ticks in RATIO_TICKS.items() if high / low <= reach)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def draw_ttft(axes: Axes, result: ServingResult, load: Load, styles: Mapping[str, Style]) -> None:
    """Part of the requests that had their first token by a time: all rounds together, and each round in thin lines."""
    for arm in result.arms:
        runs = result.of(arm.name, load.label)
        pooled = [request.ttft for run in runs for request in run.requests]
        if not pooled:
            continue
        hue = styles[arm.name]["color"]
        for run in runs if len(runs) > 1 else ():
            if run.requests:
                axes.ecdf([request.ttft for request in run.requests], color=hue, linewidth=0.6, alpha=0.45)
        axes.ecdf(pooled, color=hue, linewidth=1.9, label=arm.title)
    axes.set_xlim(left=0)
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("part of the requests")
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_timelines(panels: Sequence[Axes], result: ServingResult, load: Load, styles: Mapping[str, Style]) -> None:
    """Pages in use, running, waiting and pages freed over time, one panel each; the first round in a thick line."""
    for arm in result.arms:
        hue = styles[arm.name]["color"]
        for number, run in enumerate(result.of(arm.name, load.label)):
            look = {"color": hue, "linewidth": 1.5 if number == 0 else 0.7, "alpha": 1.0 if number == 0 else 0.4}
            for axes, values in zip(panels, _series(run, arm), strict=True):
                if values is not None:
                    axes.plot(run.timeline.seconds, values, **look)
    for axes, name in zip(panels, ("pages in use", "running", "waiting", "pages freed"), strict=True):
        axes.set_ylabel(name)
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        axes.locator_params(axis="y", nbins=4)
    panels[-1].set_xlabel("seconds since the start of the run")


def _series(run: Run, arm: Arm) -> tuple[list[float] | None, ...]:
    line = run.timeline
    return [usage * arm.pool_blocks for usage in line.pool_usage], line.running, line.waiting, line.pages_freed
