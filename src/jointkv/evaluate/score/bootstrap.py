"""Bootstrap intervals of means over requests, and of differences paired by request.

Source: Efron, "Better Bootstrap Confidence Intervals", JASA 82 (1987): bias-corrected and accelerated (BCa), as in
`scipy.stats.bootstrap`. A request is the unit that is drawn again, so requests must be independent of each other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jointkv.errors import BadInput

# Draws times values in memory at a time: 40 MB of float64.
_BATCH_VALUES = 5_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The interval of the mean of `values`, one per request.

    Values that are all equal give a width of zero: the sample shows no variation, which is no proof that there is none
    (with n equal 0/1 scores up to about 3/n of the requests may differ, at 95%). Where BCa is undefined, the interval
    is the plain percentile one. Raises `BadInput` for fewer than two values, or one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise BadInput(f"an interval needs the values of at least 2 requests, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise BadInput("an interval needs finite values")
    if not 0 < confidence < 1:
        raise BadInput(f"confidence must lie between 0 and 1, got {confidence}")
    if draws < 1:
        raise BadInput(f"draws must be at least 1, got {draws}")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean, mean)
    low, high = _ends(sample, "BCa", confidence, draws, seed)
    if not math.isfinite(low + high):
        low, high = _ends(sample, "percentile", confidence, draws, seed)
    return Interval(mean, low, high)


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The interval of the mean of `a - b`, where `a[i]` and `b[i]` belong to the same request.

    Pairing removes what requests differ in by themselves, so it finds smaller differences than two intervals would.
    Raises `BadInput` as `interval` does, and for different lengths.
    """
    if len(a) != len(b):
        raise BadInput(f"paired scores need the same requests, got {len(a)} and {len(b)}")
    return interval(np.subtract(a, b).tolist(), confidence, draws, seed)


def _ends(sample: np.ndarray, kind: str, confidence: float, draws: int, seed: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        # scipy warns where BCa is undefined and gives NaN, which the caller deals with.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.bootstrap(
            (sample,),
            np.mean,
            n_resamples=draws,
            batch=max(1, _BATCH_VALUES // len(sample)),
            confidence_level=confidence,
            method=kind,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)
