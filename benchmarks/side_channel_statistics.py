"""How well one number that an attacker sees tells two classes of trials apart: AUC, its interval, what could be missed.

Source of the test: Mann and Whitney, "On a test of whether one of two random variables is stochastically larger than
the other", Ann. Math. Statist. 18 (1947). Classes must have been drawn at random, trial by trial: then the test holds
on a busy machine too, because its noise falls on both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jointkv.errors import BadInput

LEVEL = 0.05
"""Chance of a false alarm in a whole set of tests."""


@dataclass(frozen=True)
class Separation:
    """How well values of trials in which the guess was resident are told from those in which it was not.

    Attributes:
        auc: chance that a resident trial's value is larger than another's, ties counting half: 0.5 tells nothing, 0
            and 1 tell all. It is the area under the curve of all threshold classifiers.
        low, high: bootstrap interval of it, each class drawn again by itself. Classes without overlap give a width
            of 0, which is no proof that there is none.
        accuracy: share of trials that the best threshold tells right, mean over both classes; threshold and direction
            are chosen on one half of the trials and judged on the other, both ways round.
        p_value: of the two-sided Mann-Whitney test.
        median_absent, median_resident: in the unit of the values.
        absent, resident: number of trials.
    """

    auc: float
    low: float
    high: float
    accuracy: float
    p_value: float
    median_absent: float
    median_resident: float
    absent: int
    resident: int


def separation(
    absent: Sequence[float], resident: Sequence[float], confidence: float = 0.95, draws: int = 4000, seed: int = 0
) -> Separation:
    """How well values of the two classes are told apart.

    Raises:
        BadInput: fewer than two trials of a class, or a value that is not finite.
    """
    zeros, ones = (np.asarray(values, dtype=np.float64) for values in (absent, resident))
    for values in (zeros, ones):
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
            raise BadInput("telling classes apart needs at least 2 trials of each, and finite values")
    larger = (np.sign(ones - zeros[:, None]) + 1) / 2
    low, high = _interval(larger, confidence, draws, seed)
    equal = bool(np.ptp(np.concatenate((zeros, ones))) == 0)
    return Separation(
        auc=float(larger.mean()),
        low=low,
        high=high,
        accuracy=held_out_accuracy(zeros, ones),
        p_value=1.0 if equal else float(stats.mannwhitneyu(zeros, ones).pvalue),
        median_absent=float(np.median(zeros)),
        median_resident=float(np.median(ones)),
        absent=len(zeros),
        resident=len(ones),
    )


def smallest_detectable_auc(absent: int, resident: int, tests: int = 1, power: float = 0.8) -> float:
    """The least AUC above 0.5 (or below, mirrored) that the Mann-Whitney test finds with chance `power`.

    Normal approximation with the statistic's variance under no difference, `(m + n + 1) / (12 m n)`.

    Args:
        tests: number of tests that share `LEVEL` (Bonferroni).
    """
    spread = ((absent + resident + 1) / (12 * absent * resident)) ** 0.5
    return float(0.5 + (stats.norm.isf(LEVEL / tests / 2) + stats.norm.ppf(power)) * spread)


def held_out_accuracy(absent: np.ndarray, resident: np.ndarray) -> float:
    """See `Separation.accuracy`; every second trial of a class belongs to one half."""
    scores = []
    for half in (0, 1):
        threshold, sign = best_threshold(absent[half::2], resident[half::2])
        zeros, ones = absent[1 - half :: 2], resident[1 - half :: 2]
        scores += [np.mean(sign * zeros <= sign * threshold), np.mean(sign * ones > sign * threshold)]
    return float(np.mean(scores))


def best_threshold(absent: np.ndarray, resident: np.ndarray) -> tuple[float, float]:
    """Threshold and sign with which `sign * value > sign * threshold` is right most often, mean over both classes."""
    values = np.unique(np.concatenate((absent, resident)))
    # Between two values, so that a new one near either falls on its side.
    thresholds = np.concatenate((values[:1] - 1.0, (values[1:] + values[:-1]) / 2))
    right = [np.mean(resident > threshold) - np.mean(absent > threshold) for threshold in thresholds]
    best = int(np.argmax(np.abs(right)))
    return float(thresholds[best]), 1.0 if right[best] >= 0 else -1.0


def _interval(larger: np.ndarray, confidence: float, draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `larger [absent, resident]` when rows and columns are drawn again."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.multinomial(size, np.full(size, 1 / size), draws) / size for size in larger.shape)
    means = ((rows @ larger) * columns).sum(1)
    # Weights add up to 1 but for rounding.
    low, high = np.quantile(means.clip(0, 1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
