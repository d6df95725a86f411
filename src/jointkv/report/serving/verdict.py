"""What comparisons show: a word per load, and a sentence on them and one on memory per arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

from jointkv.bench.result import Load, ServingResult
from jointkv.report.markdown import NOT_MEASURED, words
from jointkv.report.serving.memory import STATES, Pressure, pressure
from jointkv.report.serving.metrics import COMPARED, DECISIVE, OUTPUT_RATE, PAGES_FREED, SAID, SKIPPED, Metric
from jointkv.report.serving.pairs import (
    Pair,
    Ratio,
    called,
    fusion_pairs,
    heading,
    large_pool,
    pairs_run,
    pool_bytes,
    ratio,
)

Kind = Literal["helps", "mixed", "costs", "unclear", "none"]
WORDS: dict[Kind, str] = {
    "helps": "helps",
    "mixed": "trade",
    "costs": "costs",
    "unclear": "unclear",
    "none": "no effect",
}
T = TypeVar("T")

LEAST = 0.03
"""A median ratio nearer to 1 than this is no difference."""
WIDE = 0.1
"""Rounds further from 1 than this are clear if they agree, and too much spread to say that there is no difference."""

RULES = (
    f"A metric is better or worse if the median of its ratios is more than {LEAST:.0%} from 1, every round points the "
    "same way, and either the median is at least as far from 1 as the rounds are apart (on a logarithmic scale) or "
    f"every round is more than {WIDE:.0%} from 1. It is unchanged if the median is within {LEAST:.0%} and every round "
    f"within {WIDE:.0%} of 1. All else, and a single round, is unclear. Fusion helps at a load if one of TTFT p95, "
    "output tokens/s and end-to-end p95 is better and none is worse; it costs in the opposite case; with both it is "
    "a trade; if all three are unchanged it has no effect. Where no page was freed and no "
    "prompt token skipped, no gain is put down to fusion: the load is without effect unless a median is a loss. "
    "p is two-sided, from an exact permutation test that exchanges the arms within rounds; it is not corrected for the "
    "number of comparisons."
)


@dataclass(frozen=True)
class Effect:
    """What fusion did under one load.

    Attributes:
        ratios: of `COMPARED`.
        pressure: memory of the arm without fusion.
        demand: pages the load takes at its peak if it may, over the pages of the pool; from the arm with a large pool,
            None without one.
        freed: pages given back, median over rounds; None where not known.
        skipped: part of the prompt tokens, likewise.
    """

    load: Load
    kind: Kind
    ratios: Mapping[Metric, Ratio]
    pressure: Pressure
    demand: float | None
    freed: float | None
    skipped: float | None


@dataclass(frozen=True)
class Verdict:
    """One arm with fusion against its counterpart; `kind` is over all loads: `mixed` if they differ in direction."""

    result: ServingResult
    pair: Pair
    kind: Kind
    effects: tuple[Effect, ...]

    @property
    def sentence(self) -> str:
        """What fusion did, and how much, at which loads."""
        clauses = [
            f"{WORDS[kind]} at {_loads(effects)} ({_numbers(effects)})"
            for kind, effects in _grouped(self.effects, lambda effect: effect.kind, tuple(WORDS))
        ]
        return (
            f"On {words(self.result.traffic)} traffic with {self.pair.lower.pool_blocks:,} blocks, "
            f"{called(self.pair.upper)} against {called(self.pair.lower)}: {'; '.join(clauses)}."
        )

    @property
    def memory(self) -> str:
        """Whether memory was short without fusion, and what fusion freed and skipped."""
        only = {"ample": "" if self.pair.upper.reuses else ", so fusion could only cost"}
        clauses = [
            f"{STATES[state]}{only.get(state, '')} at {_loads(effects)} "
            f"({_span([each.pressure.usage for each in effects], '.0%')} of the "
            f"pool in use at the peak, {_span([each.pressure.waiting for each in effects], '.1f')} requests waiting)"
            for state, effects in _grouped(self.effects, lambda effect: effect.pressure.state, tuple(STATES))
        ]
        freed = _span([each.freed for each in self.effects], ",.0f")
        said = f"Without fusion, {'; '.join(clauses)}. Pages freed by {called(self.pair.upper)} in a run: {freed}."
        if self.pair.upper.reuses:
            said += f" Prompt tokens it skipped: {_span([each.skipped for each in self.effects], '.0%')}."
        return said


def judge(rounds: Sequence[float], higher_is_better: bool) -> Kind:
    """The kind of one metric from its ratios, by `RULES`: `helps` is better, `costs` is worse."""
    if len(rounds) < 2:
        return "unclear"
    gains = [math.log(value) if higher_is_better else -math.log(value) for value in rounds]
    middle, apart = median(gains), max(gains) - min(gains)
    if abs(median(rounds) - 1) <= LEAST:
        return "none" if all(abs(value - 1) <= WIDE for value in rounds) else "unclear"
    if min(gains) <= 0 <= max(gains):
        return "unclear"
    if abs(middle) < apart and any(abs(value - 1) <= WIDE for value in rounds):
        return "unclear"
    return "helps" if middle > 0 else "costs"


def combine(kinds: Sequence[Kind]) -> Kind:
    """One kind from those of several metrics or loads."""
    found = set(kinds)
    if "mixed" in found or {"helps", "costs"} <= found:
        return "mixed"
    for kind in ("helps", "costs"):
        if kind in found:
            return kind  # type: ignore[return-value]
    return "none" if found == {"none"} else "unclear"


def verdicts(result: ServingResult) -> list[Verdict]:
    """One for every arm with fusion that was run under a load together with its counterpart."""
    found = []
    for pair in fusion_pairs(result):
        effects = tuple(_effect(result, pair, load) for load in result.loads if pair in pairs_run(result, load))
        if effects:
            found.append(Verdict(result, pair, combine([effect.kind for effect in effects]), effects))
    return found


def _effect(result: ServingResult, pair: Pair, load: Load) -> Effect:
    ratios = {metric: ratio(result, pair.upper, pair.lower, load, metric) for metric in COMPARED}
    runs = result.of(pair.upper.name, load.label)
    freed, skipped = PAGES_FREED.samples(runs), SKIPPED.samples(runs)
    kind = combine([judge(ratios[metric].rounds, bool(metric.higher_is_better)) for metric in DECISIVE])
    if freed and max(*freed, *skipped, 0) == 0 and kind != "costs":
        kind = "unclear" if any(_maybe_worse(ratios[metric]) for metric in DECISIVE) else "none"
    limit = large_pool(result, pair.lower)
    peaks = [run.pool_usage_peak for run in result.of(limit.name, load.label)] if limit else []
    demand = median(peaks) * pool_bytes(result, limit) / pool_bytes(result, pair.lower) if limit and peaks else None
    return Effect(
        load,
        kind,
        ratios,
        pressure(result, pair.lower, load),
        demand,
        freed=median(freed) if freed else None,
        skipped=median(skipped) if skipped else None,
    )


def _maybe_worse(found: Ratio) -> bool:
    """The median is a loss of more than `LEAST`, whatever the spread; or there is no spread to look at."""
    if found.median is None or len(found.rounds) < 2:
        return True
    return found.median < 1 - LEAST if found.metric.higher_is_better else found.median > 1 + LEAST


def ranked(found: Sequence[Verdict]) -> list[tuple[Verdict, Effect]]:
    """All comparisons, from the least short of memory to the most."""
    both = [(verdict, effect) for verdict in found for effect in verdict.effects]
    return sorted(both, key=lambda pair: (pair[1].pressure.usage, pair[1].pressure.waiting))


def break_even(found: Sequence[tuple[Verdict, Effect]]) -> str:
    """From where on fusion helped, of comparisons that are `ranked`."""
    helped = [(verdict, effect) for verdict, effect in found if effect.kind == "helps"]
    sentence = f"Fusion helped in {len(helped)} of {len(found)} comparisons"
    if not helped:
        return f"{sentence}."
    verdict, least = helped[0]
    return (
        f"{sentence}; the one least short of memory is {heading(verdict.result)}, {least.load.label}, with "
        f"{least.pressure.usage:.0%} of the pool in use at the peak and {least.pressure.waiting:.1f} requests waiting "
        "without fusion."
    )


def _numbers(effects: Sequence[Effect]) -> str:
    """Median ratios, smallest to largest over `effects`, and p of the first."""
    medians = [
        f"{metric.short} {_span([effect.ratios[metric].median for effect in effects], '.2f')}x" for metric in SAID
    ]
    rates = [effect.ratios[OUTPUT_RATE] for effect in effects]
    p, least = _span([rate.p for rate in rates], ".2g"), _span([rate.smallest_p for rate in rates], ".2g")
    return f"{', '.join(medians)}; rounds {_span([len(rate.rounds) for rate in rates], 'd')}, p {p}, at best {least}"


def _grouped(effects: Sequence[Effect], key: Callable[[Effect], T], order: Sequence[T]) -> list[tuple[T, list[Effect]]]:
    groups = [(value, [effect for effect in effects if key(effect) == value]) for value in order]
    return [(value, found) for value, found in groups if found]


def _loads(effects: Sequence[Effect]) -> str:
    *first, last = [effect.load.label for effect in effects]
    return f"{', '.join(first)} and {last}" if first else last


def _span(values: Sequence[float | None], form: str) -> str:
    """The smallest and the largest; one if they are written alike."""
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(format(end, form) for end in (min(known), max(known)))) if known else NOT_MEASURED
