"""Whether memory was what held a run back, in words: where it was not, saving it cannot help."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from jointkv.bench.result import Arm, Load, Run, ServingResult
from jointkv.report.serving.metrics import OUTPUT_RATE, PAGES_FREED, RUNNING_PEAK, Metric
from jointkv.report.serving.pairs import Pair, called, large_pool, loads_run, ratio

State = Literal["short", "full", "blocked", "ample"]

FULL = 0.9
"""A pool of which at least this part is in use is full, and so is one without room for the longest request."""
WAITS = 1.0
"""Requests waiting on average from which on they queue; fewer are a moment's admission."""


@dataclass(frozen=True)
class Pressure:
    """Memory of one arm under one load; medians over rounds.

    Attributes:
        state: `short`: full, and requests queued or were preempted. `full`: full without a queue. `blocked`: requests
            queued although there was room. `ample`: neither.
    """

    load: str
    state: State
    usage: float
    waiting: float
    preemptions: float


def pressure(result: ServingResult, arm: Arm, load: Load) -> Pressure:
    """Of an arm that was run under `load`."""
    runs = result.of(arm.name, load.label)
    usage = median(run.pool_usage_peak for run in runs)
    waiting = median(run.waiting_mean for run in runs)
    preemptions = median(run.preemptions for run in runs)
    queued = waiting >= WAITS or preemptions > 0
    states: dict[tuple[bool, bool], State] = {
        (True, True): "short",
        (True, False): "full",
        (False, True): "blocked",
        (False, False): "ample",
    }
    free = (1 - usage) * arm.pool_blocks
    full = usage >= FULL or free < _longest(runs) / result.block_size
    return Pressure(load.label, states[full, queued], usage, waiting, preemptions)


def _longest(runs: list[Run]) -> int:
    """Tokens of the longest request with its output; 0 without requests."""
    return max((each.prompt_tokens + each.output_tokens for run in runs for each in run.requests), default=0)


def explain(result: ServingResult, pair: Pair) -> list[str]:
    """What the numbers say on why the comparison came out as it did: a sentence for each state of memory, and then
    what fusion found to share, how many requests ran at once, and what a large pool gives."""
    base = called(pair.lower)
    loads = loads_run(result, (pair.upper, pair.lower))
    found: dict[State, list[Pressure]] = {}
    for load in loads:
        each = pressure(result, pair.lower, load)
        found.setdefault(each.state, []).append(each)
    sentences = [
        _memory(base, state, found[state]) for state in ("short", "full", "blocked", "ample") if state in found
    ]  # type: ignore[index]
    sentences.append(_shared(result, pair, loads))
    sentences.append(_at_once(result, pair, loads))
    limit = large_pool(result, pair.lower)
    if limit is not None:
        sentences.append(_limit(result, pair, limit))
    return [sentence for sentence in sentences if sentence]


def _memory(base: str, state: State, found: list[Pressure]) -> str:
    where = ", ".join(each.load for each in found)
    usage = f"{max(each.usage for each in found):.0%}"
    waiting = max(each.waiting for each in found)
    preemptions = max(each.preemptions for each in found)
    match state:
        case "short":
            return (
                f"At {where}, memory was short: {base} had {usage} of its pool in use at the peak, {waiting:.1f} "
                f"requests waited on average and {preemptions:.0f} were preempted. Pages that fusion frees can be used."
            )
        case "full":
            return (
                f"At {where}, the pool of {base} was nearly full ({usage} at the peak) but nothing queued: memory "
                "was just enough."
            )
        case "blocked":
            return (
                f"At {where}, {waiting:.1f} requests waited on average although {base} never had more than {usage} of "
                "its pool in use, which leaves room for more: something other than memory holds requests back."
            )
        case "ample":
            return (
                f"At {where}, {base} never waited for memory (at most {usage} of the pool in use): memory was not "
                "short, so fusion cannot help there, it can only cost."
            )


def _shared(result: ServingResult, pair: Pair, loads: list[Load]) -> str:
    freed = _medians(result, pair.upper, loads, PAGES_FREED)
    if not freed:
        return ""
    name = called(pair.upper)
    if max(freed) == 0:
        return f"{name} gave back no page: it found nothing to share, or the pool was too empty to look."
    return f"{name} gave back {_span(freed, ',.0f')} pages in a run, of a pool of {pair.upper.pool_blocks:,}."


def _at_once(result: ServingResult, pair: Pair, loads: list[Load]) -> str:
    peaks = {arm.name: max(_medians(result, arm, loads, RUNNING_PEAK)) for arm in (pair.upper, pair.lower)}
    above, below = (f"{peaks[arm.name]:.0f} in {called(arm)}" for arm in (pair.upper, pair.lower))
    return f"At most so many requests ran at once: {above}, {below}."


def _limit(result: ServingResult, pair: Pair, limit: Arm) -> str:
    loads = loads_run(result, (limit, pair.lower, pair.upper))
    gains = [ratio(result, limit, pair.lower, load, OUTPUT_RATE).median for load in loads]
    shares = [ratio(result, pair.upper, limit, load, OUTPUT_RATE).median for load in loads]
    known = [(gain, share) for gain, share in zip(gains, shares, strict=True) if gain and share]
    if not known:
        return ""
    return (
        f"The most that memory can give here: {called(limit)} ({limit.pool_blocks:,} blocks) served "
        f"{_span([gain for gain, _ in known], '.2f')} times the output tokens/s of {called(pair.lower)}, and "
        f"{called(pair.upper)} reached {_span([share for _, share in known], '.2f')} of that arm."
    )


def _medians(result: ServingResult, arm: Arm, loads: list[Load], metric: Metric) -> list[float]:
    samples = [metric.samples(result.of(arm.name, load.label)) for load in loads]
    return [median(each) for each in samples if each]


def _span(values: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(end, form) for end in (min(values), max(values))))
