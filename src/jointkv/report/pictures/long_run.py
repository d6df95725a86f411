"""Latency and memory over the time of long runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import ClassVar

from matplotlib.figure import Figure

from jointkv.bench.long_run import LongRun, Phase
from jointkv.report.figure import colour, grid, key, legend_below, log_axis
from jointkv.report.markdown import Columns
from jointkv.report.pictures.base import Picture

WINDOWS = 24
"""Of a load, of each of which a median is drawn."""

LEAST_SECONDS = 0.001
"""The axis of times goes down to."""


class LongRuns(Picture[LongRun]):
    """Above the seconds to the first token of every request, below the memory of the server: a column per load."""

    name = "long_run"
    reads = LongRun
    about = (
        "One server per arm, its loads one after another as shares of what stock vLLM can do. TTFT in seconds, of the "
        "first and of the last third of the requests. Pages left: in use when all requests had ended."
    )

    def rows(self, results: Sequence[LongRun]) -> list[tuple[LongRun, Phase]]:
        return [(result, phase) for result in results for phase in result.phases]

    def draw(self, results: Sequence[LongRun]) -> Figure | None:
        shares = sorted({phase.share for result in results for phase in result.phases})
        figure, panels = grid(2 * len(shares), len(shares), (3.6, 2.6))
        pairs = self.rows(results)
        times = [max(sample.ttft, LEAST_SECONDS) for _, phase in pairs for sample in phase.samples]
        most = max(moment.rss_mib for _, phase in pairs for moment in phase.moments)
        for number, result in enumerate(results):
            for phase in result.phases:
                column = shares.index(phase.share)
                above, below = panels[column], panels[len(shares) + column]
                minutes = [sample.start / 60 for sample in phase.samples]
                above.plot(minutes, [sample.ttft for sample in phase.samples], ".", color=colour(number), alpha=0.2)
                above.plot(*windows(phase), color=colour(number))
                at = [moment.seconds / 60 for moment in phase.moments]
                below.plot(at, [moment.rss_mib for moment in phase.moments], color=colour(number))
                above.set_title(f"{phase.share:.0%} of stock's capacity")
        for above, below in zip(panels[: len(shares)], panels[len(shares) :], strict=True):
            log_axis(above, "y", min(times), max(times))
            below.set_xlabel("minutes")
            below.set_ylim(0, 1.1 * most)
        panels[0].set_ylabel("seconds to the first token")
        panels[len(shares)].set_ylabel("resident memory (MiB)")
        legend_below(figure, 4, [key(result.arm, color=colour(number)) for number, result in enumerate(results)])
        return figure

    text: ClassVar[Columns[tuple[LongRun, Phase]]] = {
        "arm": lambda row: row[0].arm,
        "share": lambda row: f"{row[1].share:.0%}",
    }
    numbers: ClassVar[Columns[tuple[LongRun, Phase]]] = {
        "requests/s": lambda row: f"{row[1].rate:.2f}",
        "answered": lambda row: f"{len(row[1].samples):,}",
        "failed": lambda row: str(row[1].failed),
        "p50, first third": lambda row: f"{row[1].ttft('first', 50):.2f}",
        "p50, last third": lambda row: f"{row[1].ttft('last', 50):.2f}",
        "p95, first third": lambda row: f"{row[1].ttft('first', 95):.2f}",
        "p95, last third": lambda row: f"{row[1].ttft('last', 95):.2f}",
        "tokens skipped": lambda row: f"{row[1].grown('tokens_skipped'):,.0f}",
        "licences won, lost": lambda row: (
            f"{row[1].grown('licences_granted'):.0f}, {row[1].grown('licences_lost'):.0f}"
        ),
        "pages left": lambda row: str(row[1].pages_left),
        "memory": lambda row: f"{row[1].grown('rss_mib'):+.0f} MiB",
    }


def windows(phase: Phase) -> tuple[list[float], list[float]]:
    """Minutes, and the median of the seconds to the first token around them."""
    ordered = sorted(phase.samples, key=lambda sample: sample.start)
    size = max(1, len(ordered) // WINDOWS)
    parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return (
        [median(sample.start for sample in part) / 60 for part in parts],
        [median(sample.ttft for sample in part) for part in parts],
    )
