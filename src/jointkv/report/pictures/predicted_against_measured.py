"""How well calibration predicted the ratio of requests it had not seen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jointkv.evaluate.calibrate.result import CalibrationRow, Calibrations
from jointkv.policy.profile import Measurement, Prediction
from jointkv.report.figure import colour, grid, key, legend_below, log_axis, marker
from jointkv.report.markdown import NOT_MEASURED, Columns, number, table, words
from jointkv.report.pictures.base import Picture

TOLERANCE = 0.1
Sampled = tuple[str, CalibrationRow]
"""A calibration, and of what: the traffic and how much of it, which must be equal to sum calibrations up together."""
Measured = tuple[Prediction, Measurement]


class PredictedAgainstMeasured(Picture[Calibrations]):
    """Predicted against measured ratio: a colour per sample, a marker per target, a point per split."""

    name = "predicted_against_measured"
    reads = Calibrations

    def rows(self, results: Sequence[Calibrations]) -> list[Sampled]:
        found = []
        for result in results:
            requests = result.settings.get("requests")
            sample = "" if requests is None else f", {requests} requests"
            found += [(words(row.traffic) + sample, row) for row in result.rows]
        return found

    def draw(self, results: Sequence[Calibrations]) -> Figure | None:
        rows = [(sample, row, both) for sample, row in self.rows(results) for both in _measured([row])]
        if not rows:
            return None
        figure, (axes,) = grid(1, 1, (5.6, 6.2))
        ends = [end for _, _, (found, held) in rows for end in (held.ratio, found.ratio, found.low, found.high)]
        low, high = min(ends), max(ends)
        line = [low / 2, high * 2]
        axes.plot(line, line, color="black", linewidth=0.8)
        near = [[end * (1 + sign * TOLERANCE) for end in line] for sign in (-1, 1)]
        axes.fill_between(line, *near, color="0.9", linewidth=0, zorder=0)
        samples = list(dict.fromkeys(sample for sample, _, _ in rows))
        targets = list(dict.fromkeys(row.target for _, row, _ in rows))
        for sample, row, (found, held) in rows:
            hue, shape = colour(samples.index(sample)), marker(targets.index(row.target))
            axes.vlines(held.ratio, found.low, found.high, color=hue, linewidth=0.9, alpha=0.6)
            face = hue if row.met else "white"
            axes.plot(held.ratio, found.ratio, shape, color=hue, markerfacecolor=face, markersize=6, zorder=3)
        for which in "xy":
            log_axis(axes, which, low, high)
        axes.set_aspect("equal")
        axes.set_xlabel("ratio measured on held-out requests")
        axes.set_ylabel("ratio predicted (bar: interval)")
        handles = [key(sample, color=colour(place)) for place, sample in enumerate(samples)]
        handles += [key(target, color="0.3", marker=marker(place)) for place, target in enumerate(targets)]
        handles.append(key("hollow: target missed", color="0.3", marker="o", markerfacecolor="white"))
        legend_below(figure, 3, [*handles, Patch(color="0.9", label=f"within {TOLERANCE:.0%}")])
        return figure

    def table(self, results: Sequence[Calibrations]) -> str:
        groups: dict[tuple[str, str], list[CalibrationRow]] = {}
        for sample, row in self.rows(results):
            groups.setdefault((sample, row.target), []).append(row)
        return (
            "Each split chooses thresholds on one half of the requests and is measured on the other. "
            "Medians over splits. Deviation: predicted over measured ratio, less 1; the largest of any split.\n\n"
            + table(TEXT, NUMBERS, groups.items())
        )


Group = tuple[tuple[str, str], list[CalibrationRow]]
TEXT: Columns[Group] = {"sample": lambda group: group[0][0], "target": lambda group: group[0][1]}
NUMBERS: Columns[Group] = {
    "splits": lambda group: str(len(group[1])),
    "target met": lambda group: _met(group[1]),
    "ratio predicted": lambda group: _median([found.ratio for found, _ in _measured(group[1])], ".2f"),
    "ratio measured": lambda group: _median([held.ratio for _, held in _measured(group[1])], ".2f"),
    "largest deviation": lambda group: _deviation(_measured(group[1])),
    "KL": lambda group: _median([held.kl for _, held in _measured(group[1])], ".3g"),
    "KL, worst split": lambda group: number(max((held.kl for _, held in _measured(group[1])), default=None), ".3g"),
    "KL, worst request": lambda group: number(
        max((held.kl_worst_request for _, held in _measured(group[1])), default=None), ".3g"
    ),
    "seconds": lambda group: _median([row.seconds for row in group[1] if row.seconds is not None], ".0f"),
}


def _measured(rows: Sequence[CalibrationRow]) -> list[Measured]:
    found = [(row.predicted, row.held_out) for row in rows]
    return [(predicted, held) for predicted, held in found if predicted is not None and held is not None]


def _median(values: Sequence[float], form: str) -> str:
    return number(median(values) if values else None, form)


def _met(rows: Sequence[CalibrationRow]) -> str:
    unmet = sum(row.unmet is not None for row in rows)
    return f"{sum(row.met for row in rows)} of {len(rows)}" + (f" ({unmet} out of reach)" if unmet else "")


def _deviation(measured: Sequence[Measured]) -> str:
    deviations = [found.ratio / held.ratio - 1 for found, held in measured]
    return f"{max(deviations, key=abs):+.1%}" if deviations else NOT_MEASURED
