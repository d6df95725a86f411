"""Arms compared with each other, paired by round: ratios, their median, an exact permutation test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
from scipy.stats import permutation_test

from jointkv.bench.arms import LARGE_POOL
from jointkv.bench.result import Arm, Comparison, Latency, Load, Run

MOST_ROUNDS = 16
"""The test looks at two to the power of this many exchanges."""


def _latency(which: Callable[[Run], Latency | None], percentile: str) -> Callable[[Run], float | None]:
    def read(run: Run) -> float | None:
        latency = which(run)
        return None if latency is None else getattr(latency, percentile)

    return read


METRICS: dict[str, Callable[[Run], float | None]] = {
    "output_tokens_per_s": lambda run: run.output_tokens_per_s,
    "total_tokens_per_s": lambda run: run.total_tokens_per_s,
    "requests_per_s": lambda run: run.requests_per_s,
    "ttft_p50": _latency(lambda run: run.ttft, "p50"),
    "ttft_p95": _latency(lambda run: run.ttft, "p95"),
    "ttft_p99": _latency(lambda run: run.ttft, "p99"),
    "itl_p50": _latency(lambda run: run.itl, "p50"),
    "itl_p95": _latency(lambda run: run.itl, "p95"),
    "e2el_p50": _latency(lambda run: run.e2el, "p50"),
    "e2el_p95": _latency(lambda run: run.e2el, "p95"),
    "running_peak": lambda run: run.running_peak,
    "running_mean": lambda run: run.running_mean,
    "preemptions": lambda run: run.preemptions,
}


def pairs(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Who is compared with whom, as (upper, lower): all with `stock`, or else the first; then all with `large_pool`."""
    names = [arm.name for arm in arms]
    base = "stock" if "stock" in names else names[0]
    small = [name for name in names if name != LARGE_POOL]
    found = [(name, base) for name in small if name != base and base in small]
    return found + [(name, LARGE_POOL) for name in small if LARGE_POOL in names]


def compare(runs: Sequence[Run], arms: Sequence[Arm], loads: Sequence[Load]) -> list[Comparison]:
    """Every metric of every pair under every load, over the rounds that both arms have run.

    A metric that is zero or was not measured in one of these rounds has no ratio, and is left out.
    """
    by_key = {(run.arm, run.load, run.round): run for run in runs}
    rounds = sorted({run.round for run in runs})
    found = []
    for load in loads:
        for upper, lower in pairs(arms):
            both = [
                (by_key[upper, load.label, number], by_key[lower, load.label, number])
                for number in rounds
                if (upper, load.label, number) in by_key and (lower, load.label, number) in by_key
            ]
            for metric, read in METRICS.items():
                values = [(read(above), read(below)) for above, below in both]
                ratios = [above / below for above, below in values if above and below]
                if ratios and len(ratios) == len(values):
                    found.append(_comparison(upper, lower, load.label, metric, ratios))
    return found


def sign_flip_p(ratios: Sequence[float]) -> float:
    """Two-sided p of the mean logarithm of `ratios`, exact: over all ways to turn some of the ratios upside down.

    That is what exchanging the arms within a round does. See `smallest_p`.
    """
    if len(ratios) == 1:
        return 1.0
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    test = permutation_test(
        (logs,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2 ** len(logs),
    )
    return float(test.pvalue)


def smallest_p(rounds: int) -> float:
    """What `sign_flip_p` gives at best: all ratios on one side, of `2 ** rounds` exchanges two are as extreme."""
    return 2 / 2**rounds


def _comparison(upper: str, lower: str, load: str, metric: str, ratios: list[float]) -> Comparison:
    return Comparison(
        upper=upper,
        lower=lower,
        load=load,
        metric=metric,
        ratios=ratios,
        median_ratio=median(ratios),
        p=sign_flip_p(ratios),
        smallest_p=smallest_p(len(ratios)),
    )
