"""How well calibration predicted the ratio of requests it had not seen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from jointkv.report.markdown import NOT_MEASURED, number, table
from jointkv.report.pictures.base import Picture, colour, grid, legend_below, marker, ratio_axis
from jointkv.report.results import Calibrations, Split

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOLERANCE = 0.1


class PredictedAgainstMeasured(Picture[Calibrations]):
    """Predicted against measured ratio: a colour per sample, a marker per target, a point per split."""

    name = "predicted_against_measured"
    reads = Calibrations

    def shows(self, result: Calibrations) -> bool:
        return bool(result.rows)

    def draw(self, results: Sequence[Calibrations]) -> Figure | None:
        found = [(sample, split) for sample, split in _splits(results) if split.deviation is not None]
        if not found:
            return None
        figure, (axes,) = grid(1, 1, (5.6, 6.2))
        ends = [value for _, split in found for value in _ends(split)]
        low, high = min(ends), max(ends)
        _draw_identity(axes, low / 2, high * 2)
        samples = list(dict.fromkeys(sample for sample, _ in found))
        targets = list(dict.fromkeys(split.target for _, split in found))
        for sample, split in found:
            _draw_split(axes, split, colour(samples.index(sample)), marker(targets.index(split.target)))
        ratio_axis(axes, "x", low, high)
        ratio_axis(axes, "y", low, high)
        axes.set_aspect("equal")
        axes.set_xlabel("ratio measured on held-out requests")
        axes.set_ylabel("ratio predicted (bar: interval)")
        legend_below(figure, 3, _handles(samples, targets))
        return figure

    def table(self, results: Sequence[Calibrations]) -> str:
        groups: dict[tuple[str, str], list[Split]] = {}
        for sample, split in _splits(results):
            groups.setdefault((sample, split.target), []).append(split)
        return (
            "Each split chooses thresholds on one half of the requests and is measured on the other. "
            "Medians over splits. Deviation: predicted over measured ratio, less 1; the largest of any split.\n\n"
            + table(
                ("sample", "target"),
                NUMBERS,
                (_line(sample, target, found) for (sample, target), found in groups.items()),
            )
        )


NUMBERS = (
    "splits",
    "target met",
    "ratio predicted",
    "ratio measured",
    "largest deviation",
    "KL",
    "KL, worst split",
    "KL, worst request",
    "seconds",
)


def _line(sample: str, target: str, splits: Sequence[Split]) -> list[str]:
    measured = [split.held_out for split in splits if split.held_out is not None]
    predicted = [split.predicted.ratio for split in splits if split.predicted is not None]
    out_of_reach = sum(split.unmet is not None for split in splits)
    divergences = [held.kl for held in measured if held.kl is not None]
    worst = [held.kl_worst_request for held in measured if held.kl_worst_request is not None]
    deviations = [split.deviation for split in splits if split.deviation is not None]
    seconds = [split.seconds for split in splits if split.seconds is not None]
    return [
        sample,
        target,
        str(len(splits)),
        f"{sum(split.met for split in splits)} of {len(splits)}"
        + (f" ({out_of_reach} out of reach)" if out_of_reach else ""),
        number(median(predicted) if predicted else None, ".2f"),
        number(median([held.ratio for held in measured]) if measured else None, ".2f"),
        f"{max(deviations, key=abs):+.1%}" if deviations else NOT_MEASURED,
        number(median(divergences) if divergences else None, ".3g"),
        number(max(divergences, default=None), ".3g"),
        number(max(worst, default=None), ".3g"),
        number(median(seconds) if seconds else None, ".0f"),
    ]


def _splits(results: Sequence[Calibrations]) -> list[tuple[str, Split]]:
    return [(result.sample(split), split) for result in results for split in result.rows]


def _ends(split: Split) -> list[float]:
    assert split.held_out is not None and split.predicted is not None
    predicted = split.predicted
    found = (split.held_out.ratio, predicted.ratio, predicted.low, predicted.high)
    return [value for value in found if value is not None]


def _draw_identity(axes: Axes, low: float, high: float) -> None:
    ends = [low, high]
    axes.plot(ends, ends, color="black", linewidth=0.8, label="equal")
    inside = [[end * (1 + sign * TOLERANCE) for end in ends] for sign in (-1, 1)]
    axes.fill_between(ends, *inside, color="0.9", linewidth=0, zorder=0, label=f"within {TOLERANCE:.0%}")


def _draw_split(axes: Axes, split: Split, hue: Any, shape: str) -> None:
    assert split.held_out is not None and split.predicted is not None
    predicted, measured = split.predicted, split.held_out.ratio
    ends = [predicted.low or predicted.ratio, predicted.high or predicted.ratio]
    axes.vlines(measured, *ends, color=hue, linewidth=0.9, alpha=0.6)
    face = hue if split.met else "white"
    axes.plot(measured, predicted.ratio, shape, color=hue, markerfacecolor=face, markersize=6, zorder=3)


def _handles(samples: Sequence[str], targets: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        *(Patch(color=colour(place), label=sample) for place, sample in enumerate(samples)),
        *(
            Line2D([], [], color="0.3", marker=marker(place), linestyle="", label=target)
            for place, target in enumerate(targets)
        ),
        Line2D([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="", label="hollow: target missed"),
        Patch(color="0.9", label=f"within {TOLERANCE:.0%}"),
    ]
