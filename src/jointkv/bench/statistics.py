"""Arms compared with each other, paired by round: ratios, their median, an exact permutation test."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import permutation_test

from jointkv.bench.arms import LARGE_POOL
from jointkv.bench.result import Arm, Comparison, Load, Run

METRICS = (
    *("ttft.p50", "ttft.p95", "ttft.p99", "output_tokens_per_s", "total_tokens_per_s", "requests_per_s"),
    *("itl.p50", "itl.p95", "e2el.p50", "e2el.p95", "running_peak", "running_mean", "preemptions"),
    "prompt_tokens_computed",
)
"""Fields of `Run`, and of the latencies in it."""


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
    by_key = {run.key: run for run in runs}
    rounds = sorted({run.round for run in runs})
    found = []
    for load in loads:
        for upper, lower in pairs(arms):
            keys = [((upper, load.label, number), (lower, load.label, number)) for number in rounds]
            both = [(by_key[above], by_key[below]) for above, below in keys if above in by_key and below in by_key]
            for metric in METRICS:
                values = [(_value(above, metric), _value(below, metric)) for above, below in both]
                ratios = [above / below for above, below in values if above and below]
                if ratios and len(ratios) == len(values):
                    found.append(_comparison(upper, lower, load, metric, ratios))
    return found


def _value(run: Run, metric: str) -> float | None:
    value: Any = run
    for name in metric.split("."):
        value = None if value is None else getattr(value, name)
    return None if value is None else float(value)


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


def _comparison(upper: str, lower: str, load: Load, metric: str, ratios: list[float]) -> Comparison:
    return Comparison(
        upper=upper,
        lower=lower,
        load=load.label,
        metric=metric.replace(".", "_"),
        ratios=ratios,
        median_ratio=median(ratios),
        p=sign_flip_p(ratios),
        smallest_p=smallest_p(len(ratios)),
    )
