"""The charts of the page, as inline SVG with a legend and alternative text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from jointkv.bench.result import Load, ServingResult
from jointkv.report.pictures.base import colour, grid
from jointkv.report.serving import charts
from jointkv.report.serving.break_even import Point, heading
from jointkv.report.serving.metrics import DRAWN, OUTPUT_RATE, TTFT_P95, Metric
from jointkv.report.serving.pairs import called, fusion_pairs, large_pool, ratio
from jointkv.report.serving.svg import inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.3, 2.8)
"""Inches of a chart; on a phone it has about this width."""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        svg: markup that is safe as it is.
        legend: colour and words.
    """

    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...]


class Figures:
    """Makes charts for one page; call it inside `page_style`."""

    def __init__(self, results: Sequence[ServingResult]) -> None:
        self.styles = charts.arm_styles(results)
        self._names = count(1)

    def levels(self, result: ServingResult) -> Iterator[Chart]:
        """Every compared metric against the load, for each kind of load."""
        for loads in charts.families(result):
            run = [load for load in loads if any(each.load == load.label for each in result.runs)]
            for metric in DRAWN:
                samples = metric.samples([each for each in result.runs if each.load in {load.label for load in run}])
                if not run or not samples:
                    continue
                title = f"{metric.title} against the load" if len(run) > 1 else metric.title
                said = _levels_said(result, run, metric)
                yield self._chart(
                    title,
                    "Points: rounds; lines: medians.",
                    said,
                    self._legend(result),
                    partial(charts.draw_levels, result=result, loads=run, metric=metric, styles=self.styles),
                )

    def ratios(self, result: ServingResult) -> Iterator[Chart]:
        """For every arm without fusion that one with fusion is held against: those arms and the large pool over it."""
        lowers = {pair.lower.name: pair.lower for pair in fusion_pairs(result)}
        for lower in lowers.values():
            uppers = [pair.upper for pair in fusion_pairs(result) if pair.lower == lower]
            limit = large_pool(result, lower)
            uppers += [limit] if limit else []
            for metric in DRAWN:
                found = [
                    (load, arm, ratio(result, arm, lower, load, metric)) for load in result.loads for arm in uppers
                ]
                if not any(each.rounds for _, _, each in found):
                    continue
                said = "; ".join(
                    f"{called(arm)} at {load.label} {each.written} ({each.range or 'one round'})"
                    for load, arm, each in found
                    if each.rounds
                )
                height = 0.9 + 0.22 * len(result.loads) * max(2, len(uppers))
                yield self._chart(
                    f"{metric.short}, ratio to {called(lower)}",
                    "Points: rounds; bars: medians; grey: within 3%.",
                    said,
                    self._legend(result, {arm.name for arm in uppers}),
                    partial(
                        charts.draw_ratios, result=result, uppers=uppers, lower=lower, metric=metric, styles=self.styles
                    ),
                    (SIZE[0], height),
                )

    def first_tokens(self, result: ServingResult) -> Iterator[Chart]:
        """The distribution of TTFT under each load."""
        for load in result.loads:
            runs = [run for run in result.runs if run.load == load.label and run.requests]
            if runs:
                yield self._chart(
                    f"Time to first token, {load.label}",
                    "Thick: all rounds together; thin: each round.",
                    f"Distribution of the time to first token at {load.label}. "
                    + _levels_said(result, [load], TTFT_P95),
                    self._legend(result),
                    partial(charts.draw_ttft, result=result, load=load, styles=self.styles),
                )

    def over_time(self, result: ServingResult) -> Iterator[Chart]:
        """Pages in use, running, waiting and pages freed, under each load."""
        for load in result.loads:
            if not any(run.load == load.label and len(run.timeline.seconds) > 1 for run in result.runs):
                continue
            figure, panels = grid(4, 1, (SIZE[0], 1.15), sharex=True)
            charts.draw_timelines(panels, result, load, self.styles)
            figure.align_ylabels(panels)
            said = f"Pages in use, running and waiting requests and pages freed over time at {load.label}."
            svg = inline(figure, self._name(), said)
            yield Chart(f"Over time, {load.label}", "Thick: first round; thin: the others.", svg, self._legend(result))

    def break_even(self, found: Sequence[Point]) -> Iterator[Chart]:
        """The ratio of output tokens/s against each measure of how short memory was that all points have."""
        names = list(dict.fromkeys(heading(point.result, point.verdict) for point in found))
        legend = tuple((_hex(colour(place)), name) for place, name in enumerate(names))
        measures = {"usage": "how full the pool was", "waiting": "how many requests waited"}
        if found and all(point.demand is not None for point in found):
            measures["demand"] = "how many pages the load takes"
        for across, words in measures.items():
            said = "; ".join(
                f"{heading(point.result, point.verdict)}, {point.effect.load}: "
                f"{point.effect.ratios[OUTPUT_RATE.name].written} at {point.pressure.usage:.0%} of the pool in use and "
                f"{point.pressure.waiting:.1f} waiting"
                for point in found
            )
            yield self._chart(
                f"Gain against {words}",
                "Large points: medians; small: rounds; grey: within 3%.",
                said,
                legend,
                partial(charts.draw_break_even, found=found, metric=OUTPUT_RATE, across=across),
            )

    def _chart(
        self,
        title: str,
        note: str,
        said: str,
        legend: tuple[tuple[str, str], ...],
        draw: Callable[[Axes], None],
        size: tuple[float, float] = SIZE,
    ) -> Chart:
        figure, (axes,) = grid(1, 1, size)
        draw(axes)
        return Chart(title, note, inline(figure, self._name(), f"{title}. {said}"), legend)

    def _legend(self, result: ServingResult, names: set[str] | None = None) -> tuple[tuple[str, str], ...]:
        arms = [arm for arm in result.arms if names is None or arm.name in names]
        return tuple((_hex(self.styles[arm.name]["color"]), f"{called(arm)}: {arm.title}") for arm in arms)

    def _name(self) -> str:
        return f"chart{next(self._names)}"


def _hex(hue: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(hue)


def _levels_said(result: ServingResult, loads: Sequence[Load], metric: Metric) -> str:
    """Medians in words."""
    parts: Mapping[str, str] = {
        f"{called(arm)} at {load.label}": metric.median(result.of(arm.name, load.label))
        for load in loads
        for arm in result.arms
        if result.of(arm.name, load.label)
    }
    return f"{metric.title}, medians: " + "; ".join(f"{name} {value}" for name, value in parts.items())
