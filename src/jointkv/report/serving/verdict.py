"""What a comparison shows, in one word per load and one sentence per arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from jointkv.bench.result import ServingResult
from jointkv.report.serving.metrics import COMPARED, DECISIVE, E2EL_P95, ITL_P50, OUTPUT_RATE, PAGES_FREED, TTFT_P95
from jointkv.report.serving.pairs import Pair, Ratio, called, fusion_pairs, loads_run, ratio

Kind = Literal["helps", "mixed", "costs", "unclear", "none"]

LEAST = 0.03
"""A median ratio nearer to 1 than this is no difference."""
WIDE = 0.1
"""Rounds further from 1 than this are clear if they agree, and too much spread to say that there is no difference."""

RULES = (
    f"A metric is better or worse if the median of its ratios is more than {LEAST:.0%} from 1, every round points the "
    "same way, and either the median is at least as far from 1 as the rounds are apart (on a logarithmic scale) or "
    f"every round is more than {WIDE:.0%} from 1. It is unchanged if the median is within {LEAST:.0%} and every round "
    f"within {WIDE:.0%} of 1. All else, and a single round, is unclear. Fusion helps at a load if one of output "
    "tokens/s, TTFT p95 and end-to-end p95 is better and none is worse; it costs in the opposite case; with both it is "
    "a trade; if all three are unchanged it has no effect. Where no page was freed, no gain "
    "is put down to fusion: the load is without effect unless a median is a loss. "
    "p is two-sided, from an exact permutation test that exchanges the arms within rounds; it is not corrected for the "
    "number of comparisons."
)


@dataclass(frozen=True)
class Effect:
    """What fusion did under one load.

    Attributes:
        ratios: of `COMPARED`, by name.
        kinds: of the same.
        idle: no page was freed in any round, as far as known.
    """

    load: str
    kind: Kind
    idle: bool
    ratios: Mapping[str, Ratio]
    kinds: Mapping[str, Kind]


@dataclass(frozen=True)
class Verdict:
    """One arm with fusion against its counterpart.

    Attributes:
        kind: over all loads; loads that differ in direction are `mixed`.
        sentence: plain text.
    """

    pair: Pair
    kind: Kind
    sentence: str
    effects: tuple[Effect, ...]


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
    pairs = fusion_pairs(result)
    for pair in pairs:
        effects = tuple(_effects(result, pair))
        if effects:
            name = "fusion" if len(pairs) == 1 else called(pair.upper)
            kind = combine([effect.kind for effect in effects])
            found.append(Verdict(pair, kind, _sentence(result, pair, name, effects), effects))
    return found


def _effects(result: ServingResult, pair: Pair) -> list[Effect]:
    effects = []
    for load in loads_run(result, (pair.upper, pair.lower)):
        ratios = {metric.name: ratio(result, pair.upper, pair.lower, load, metric) for metric in COMPARED}
        kinds = {name: judge(each.rounds, bool(each.metric.higher_is_better)) for name, each in ratios.items()}
        freed = PAGES_FREED.samples(result.of(pair.upper.name, load.label))
        idle = bool(freed) and max(freed) == 0
        decisive = [metric.name for metric in DECISIVE]
        kind = combine([kinds[name] for name in decisive])
        if idle and kind != "costs":
            kind = "unclear" if any(_maybe_worse(ratios[name]) for name in decisive) else "none"
        effects.append(Effect(load.label, kind, idle, ratios, kinds))
    return effects


def _maybe_worse(found: Ratio) -> bool:
    """The median is a loss of more than `LEAST`, whatever the spread; or there is no spread to look at."""
    if found.median is None or len(found.rounds) < 2:
        return True
    return found.median < 1 - LEAST if found.metric.higher_is_better else found.median > 1 + LEAST


def _sentence(result: ServingResult, pair: Pair, name: str, effects: Sequence[Effect]) -> str:
    groups: dict[tuple[Kind, bool], list[Effect]] = {}
    for effect in effects:
        groups.setdefault((effect.kind, effect.idle), []).append(effect)
    order: tuple[Kind, ...] = ("helps", "mixed", "costs", "unclear", "none")
    clauses = [_clause(groups[key], pair, name) for key in sorted(groups, key=lambda key: order.index(key[0]))]
    traffic = result.traffic.replace("_", "-")
    return f"On {traffic} traffic with a pool of {pair.lower.pool_blocks:,} blocks, {'; '.join(clauses)}."


def _clause(effects: Sequence[Effect], pair: Pair, name: str) -> str:
    kind, loads, base = effects[0].kind, _loads(effects), called(pair.lower)
    speed = _over(effects, OUTPUT_RATE.name)
    if kind == "none" and effects[0].idle:
        return (
            f"{name} freed no page and cost nothing beyond the spread at {loads} ({speed} times the output tokens/s of "
            f"{base})"
        )
    if kind == "none":
        return f"{name} made no difference beyond the spread at {loads} ({speed} times the output tokens/s of {base})"
    if kind == "unclear":
        why = _why_unclear(effects)
        return (
            f"nothing can be concluded on {name} at {loads}, because {why} ({speed} times the output tokens/s of {base}"
            f"{_rounds(effects)}{_significance(effects, OUTPUT_RATE.name)})"
        )
    parts = [f"served {speed} times the output tokens/s of {base}{_remark(effects)}"]
    for metric, words in (
        (TTFT_P95, "the first token came after {} of the time (p95)"),
        (E2EL_P95, "the whole answer took {} of the time (p95)"),
    ):
        if _moved(effects, metric.name):
            parts.append(words.format(_over(effects, metric.name)))
    if "costs" in {effect.kinds[ITL_P50.name] for effect in effects}:
        parts.append(f"the gap between tokens was {_over(effects, ITL_P50.name)} times as long")
    sentence = f"{name} {_and(parts)} at {loads}"
    return sentence if kind == "helps" else f"{sentence}, which is a {'cost' if kind == 'costs' else 'trade'}"


def _why_unclear(effects: Sequence[Effect]) -> str:
    rounds = max(len(effect.ratios[OUTPUT_RATE.name].rounds) for effect in effects)
    if rounds < 2:
        return "one round says nothing of the spread" if rounds else "no round has answers of both arms"
    if all(effect.idle for effect in effects):
        return "it freed no page, so what differs is not its doing"
    return "the rounds do not agree clearly"


def _remark(effects: Sequence[Effect]) -> str:
    """Behind the throughput: its p, or that it did not move."""
    if _moved(effects, OUTPUT_RATE.name):
        return f" ({_significance(effects, OUTPUT_RATE.name).removeprefix('; ')})"
    deciding = next(metric for metric in DECISIVE if _moved(effects, metric.name))
    still = {effect.kinds[OUTPUT_RATE.name] for effect in effects} == {"none"}
    words = "no difference beyond the spread" if still else "not clear beyond the spread"
    significance = _significance(effects, deciding.name)
    return f" ({words}{significance + f' for {deciding.short}' if significance else ''})"


def _moved(effects: Sequence[Effect], name: str) -> bool:
    return any(effect.kinds[name] in ("helps", "costs") for effect in effects)


def _significance(effects: Sequence[Effect], name: str) -> str:
    """`; p = 0.25, the smallest possible with 3 rounds`, or nothing without rounds."""
    known = [each for each in (effect.ratios[name] for effect in effects) if each.rounds]
    if not known:
        return ""
    values = [each.p for each in known if each.p is not None]
    least = min(each.smallest_p for each in known)
    rounds = max(len(each.rounds) for each in known)
    counted = f"{rounds} round{'s' if rounds > 1 else ''}"
    if max(values) <= least * (1 + 1e-9):
        return f"; p = {least:.2g}, the smallest possible with {counted}"
    return f"; p = {_span(values, '.2g')}, {least:.2g} being the smallest possible with {counted}"


def _rounds(effects: Sequence[Effect]) -> str:
    values = [value for effect in effects for value in effect.ratios[OUTPUT_RATE.name].rounds]
    return f", rounds {min(values):.2f} to {max(values):.2f}" if len(values) > len(effects) else ""


def _over(effects: Sequence[Effect], name: str) -> str:
    """The median ratio, or its smallest and largest over the loads."""
    return _span([value for effect in effects if (value := effect.ratios[name].median) is not None], ".2f")


def _span(values: Sequence[float], form: str) -> str:
    ends = list(dict.fromkeys(format(end, form) for end in (min(values), max(values)))) if values else ["-"]
    return " to ".join(ends)


def _loads(effects: Sequence[Effect]) -> str:
    return _and([effect.load for effect in effects])


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
