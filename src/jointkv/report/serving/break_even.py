"""Where fusion begins to help: every comparison beside how short memory was without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jointkv.bench.result import ServingResult
from jointkv.report.serving.metrics import PAGES_FREED
from jointkv.report.serving.pairs import large_pool, pool_bytes
from jointkv.report.serving.pressure import Pressure, pressure
from jointkv.report.serving.verdict import Effect, Verdict, verdicts


@dataclass(frozen=True)
class Point:
    """One arm with fusion, in one result, under one load.

    Attributes:
        pressure: of the arm without fusion.
        demand: pages the load takes at its peak if it may, over the pages of the pool; from the arm with a large pool,
            None without one.
        freed: pages given back, median over rounds.
    """

    result: ServingResult
    verdict: Verdict
    effect: Effect
    pressure: Pressure
    demand: float | None
    freed: float | None


def points(results: Sequence[ServingResult]) -> list[Point]:
    """All comparisons of `results`, from the least short of memory to the most."""
    found = []
    for result in results:
        for verdict in verdicts(result):
            pair = verdict.pair
            limit = large_pool(result, pair.lower)
            for effect in verdict.effects:
                load = next(load for load in result.loads if load.label == effect.load)
                freed = PAGES_FREED.samples(result.of(pair.upper.name, load.label))
                peaks = [run.pool_usage_peak for run in result.of(limit.name, load.label)] if limit else []
                demand = None
                if limit is not None and peaks:
                    demand = median(peaks) * pool_bytes(result, limit) / pool_bytes(result, pair.lower)
                found.append(
                    Point(
                        result,
                        verdict,
                        effect,
                        pressure(result, pair.lower, load),
                        demand,
                        median(freed) if freed else None,
                    )
                )
    return sorted(found, key=lambda point: (point.pressure.usage, point.pressure.waiting))


def in_words(found: Sequence[Point]) -> list[str]:
    """What the points say together; a sentence for each thing that they have an example of."""
    helped = [point for point in found if point.effect.kind == "helps"]
    others = [point for point in found if point.effect.kind in ("none", "costs")]
    open_ = len(found) - len(helped) - len(others)
    sentences = [
        f"Of {_count(len(found))}, fusion helped in {len(helped)} and made no difference or cost in {len(others)}"
        + (f"; {open_} {'is' if open_ == 1 else 'are'} a trade or unclear." if open_ else ".")
    ]
    sharing = [point for point in others if point.freed]
    idle = [point for point in found if point.effect.idle]
    if helped:
        least = min(helped, key=lambda point: (point.pressure.usage, point.pressure.waiting))
        sentences.append(
            f"The least short of memory that it helped in: {_where(least)}, with {least.pressure.usage:.0%} of the "
            f"pool in use at the peak and {least.pressure.waiting:.1f} requests waiting on average without fusion."
        )
    if sharing:
        most = max(sharing, key=lambda point: (point.pressure.usage, point.pressure.waiting))
        sentences.append(
            f"The shortest of memory that it did not help in although it freed pages: {_where(most)}, with "
            f"{most.pressure.usage:.0%} of the pool in use at the peak and {most.pressure.waiting:.1f} waiting."
        )
    if idle:
        fullest = max(point.pressure.usage for point in idle)
        reason = (
            "the traffic has nothing to share, so no size of the pool makes fusion help"
            if any(point.pressure.state in ("short", "full") for point in idle)
            else f"nothing to share, or the pool ({fullest:.0%} in use at most) never so full that fusion looks"
        )
        sentences.append(f"No page was freed in {'; '.join(_where(point) for point in idle)}: {reason}.")
    if helped and not others:
        sentences.append("The break-even lies below what was run: measure a larger pool or a lighter load to find it.")
    if others and not helped:
        sentences.append("The break-even was not reached: measure a smaller pool or a heavier load to find it.")
    return sentences


def heading(result: ServingResult, verdict: Verdict) -> str:
    """Traffic and pool of a comparison, short."""
    return f"{result.traffic.replace('_', '-')}, {verdict.pair.lower.pool_blocks:,} blocks"


def _where(point: Point) -> str:
    return f"{heading(point.result, point.verdict)}, {point.effect.load}"


def _count(number: int) -> str:
    return f"{number} comparison{'s' if number != 1 else ''}"
