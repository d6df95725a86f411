"""Similarities of block pairs as a point process: how often a pair exceeds a threshold, and whether counts are Poisson.

Paper, Corollary 1: the residents that a new block matches are the exceedances of a threshold, Poisson with intensity
q D for D residents, and q comes from a kernel density estimate of the similarities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from jointkv.errors import BadInput
from jointkv.theory.rate import Numbers, pair_matrix

LEAST_SAMPLES = 20
MOST_SAMPLES = 4000
"""A kernel density costs samples times evaluation points; larger inputs are subsampled to this."""

EQUAL = 1 - 1e-6
"""Cosines from here on are equal blocks up to float32 rounding: an atom of the distribution, no density."""

TAIL_SHARE, LEAST_TAIL = 0.05, 50
"""The tail is fitted to the largest 5% of the samples, at least 50 but never more than a quarter of them."""


@dataclass(frozen=True)
class SimilarityTail:
    """Distribution of the cosines of block pairs, made by `fit_similarities`.

    Attributes:
        samples: the continuous part of the cosines, sorted, at most `MOST_SAMPLES`.
        equal: share of pairs whose blocks are equal (an atom at cosine 1).
        tail_start: cosine from which the generalised Pareto tail replaces the kernel density.
        shape, scale: of the tail (Pickands 1975; shape 0: exponential, negative: ends before 1).
    """

    samples: Numbers = field(repr=False)
    equal: float
    tail_start: float
    shape: float
    scale: float
    bandwidth: float

    def density(self, cosine: ArrayLike) -> Numbers:
        """Density of the continuous part at `cosine`, by `scipy.stats.gaussian_kde`; without the atom at 1.

        What the kernels put beyond ±1 is reflected back, so the density integrates to `1 - equal`.
        """
        points = np.asarray(cosine, dtype=float)
        kernel = self._kernel()
        flat = points.ravel()
        value = kernel(flat) + kernel(2 - flat) + kernel(-2 - flat)
        return (1 - self.equal) * np.where(np.abs(flat) <= 1, value, 0.0).reshape(points.shape)

    def exceedance(self, threshold: ArrayLike) -> Numbers:
        """Match probability q: the chance that a pair's cosine is at least `threshold`.

        Up to `tail_start` u the integral of the kernel density. Beyond, few samples exceed and kernels only smear
        them, so peaks over threshold are used: excesses over a high u are generalised Pareto (Pickands-Balkema-de
        Haan), `q(t) = q(u) (G(t-u) - G(1-u)) / (1 - G(1-u))` with G the Pareto survival function, cut off at cosine 1.
        Continuous at u and falling everywhere.
        """
        points = np.asarray(threshold, dtype=float)
        flat = np.clip(points.ravel(), -1.0, 1.0)
        body = self._body(np.minimum(flat, self.tail_start))
        end = stats.genpareto.sf(1 - self.tail_start, self.shape, scale=self.scale)
        beyond = stats.genpareto.sf(np.maximum(flat - self.tail_start, 0), self.shape, scale=self.scale)
        continuous = np.clip(body * (beyond - end) / (1 - end), 0, 1)
        chance = self.equal + (1 - self.equal) * continuous
        return np.where(points.ravel() <= -1, 1.0, np.where(points.ravel() > 1, 0.0, chance)).reshape(points.shape)

    def intensity(self, threshold: ArrayLike, residents: ArrayLike) -> Numbers:
        """Mean number of residents that a new block matches, `q D`: the Poisson intensity (paper, Corollary 1)."""
        return self.exceedance(threshold) * np.asarray(residents, dtype=float)

    def _kernel(self) -> stats.gaussian_kde:
        return stats.gaussian_kde(self.samples, bw_method=self.bandwidth / self.samples.std(ddof=1))

    def _body(self, threshold: Numbers) -> Numbers:
        """Survival function of the reflected kernel density: each kernel's integral over [threshold, 1]."""
        edges = (2 - threshold, threshold, -2 - threshold)
        above, inside, below = (special.ndtr((edge[:, None] - self.samples) / self.bandwidth).mean(1) for edge in edges)
        return np.clip(above - inside + below, 0, 1)


def fit_similarities(cosines: ArrayLike, *, seed: int = 0) -> SimilarityTail:
    """Fit the distribution of pair cosines of one population (one layer, one position or all).

    The bandwidth is Silverman's `0.9 min(sd, IQR / 1.34) n^(-1/5)`, which does not blur two modes as Scott's does. More
    than `MOST_SAMPLES` cosines are drawn down to that many; the share of equal pairs is of all of them.

    Raises:
        BadInput: fewer than `LEAST_SAMPLES` finite cosines below 1, or all of them the same.
    """
    values = np.asarray(cosines, dtype=float).ravel()
    values = np.clip(values[np.isfinite(values)], -1, 1)
    continuous = values[values < EQUAL]
    equal = 1 - len(continuous) / max(1, len(values))
    if len(continuous) > MOST_SAMPLES:
        continuous = np.random.default_rng(seed).choice(continuous, MOST_SAMPLES, replace=False)
    if len(continuous) < LEAST_SAMPLES or np.ptp(continuous) < 1e-9:
        raise BadInput(
            f"a density needs at least {LEAST_SAMPLES} different cosines below 1, got {len(np.unique(continuous))}"
        )
    continuous = np.sort(continuous)
    deviation = continuous.std(ddof=1)
    width = min(deviation, stats.iqr(continuous) / 1.34) or deviation
    exceeding = min(max(LEAST_TAIL, int(TAIL_SHARE * len(continuous))), len(continuous) // 4)
    start = float(continuous[-exceeding - 1])
    excess = continuous[-exceeding:] - start
    shape, _, scale = stats.genpareto.fit(excess[excess > 0], floc=0) if (excess > 0).any() else (0.0, 0.0, width)
    bandwidth = 0.9 * width * len(continuous) ** -0.2
    return SimilarityTail(continuous, float(equal), start, float(shape), float(scale), float(bandwidth))


@dataclass(frozen=True)
class DispersionTest:
    """Are the numbers of exceedances per block Poisson?

    Attributes:
        index: variance over mean of the counts, pooled over positions; 1 for Poisson, above 1 if matches cluster,
            below 1 if they are too even (q not small: a binomial count has 1 - q).
        statistic, degrees: of the chi-square test.
        over, under: p values against clustering and against evenness.
        mean: exceedances per block.
    """

    index: float
    statistic: float
    degrees: int
    over: float
    under: float
    mean: float

    @property
    def p_value(self) -> float:
        """Two-sided p value."""
        return min(1.0, 2 * min(self.over, self.under))


def dispersion_test(accepted: ArrayLike, valid: ArrayLike | None = None, *, seed: int = 0) -> DispersionTest:
    """Test the assumption behind Corollary 1: exceedances of a block among the residents are Poisson.

    Requests are split at random in two halves; the count of a block of one half is the number of blocks of the other
    half that may serve it. Counts then share no pair, so under the assumption they are independent and, at one
    position, of one mean. Given its total, Fisher's index `X2 = sum (c - mean)^2 / mean` has expectation exactly
    (blocks - 1) and nearly the variance of chi-square, however small the mean; X2 and degrees are added over
    positions (positions without any match say nothing and are left out). Matches that a pair of requests has at many
    positions count as so many tests: then p values are too extreme, the index is still right.

    Raises:
        BadInput: shapes that do not fit, or no position with a match and two blocks to compare.
    """
    pairs, present = pair_matrix(accepted, valid)
    requests = np.random.default_rng(seed).permutation(present.shape[1])
    new, resident = np.array_split(requests, 2)
    counts = pairs[:, new][:, :, resident].sum(2).astype(float)
    counted = present[:, new]
    used = (counted.sum(1) > 1) & (counts.sum(1) > 0)
    if not used.any():
        raise BadInput("no position has a match between two blocks: nothing to test")
    counts, counted = counts[used], counted[used]
    return _dispersion(counts, counted)


def _dispersion(counts: Numbers, counted: NDArray[np.bool_]) -> DispersionTest:
    mean = counts.sum(1, keepdims=True) / counted.sum(1, keepdims=True)
    statistic = float((np.where(counted, counts - mean, 0.0) ** 2 / mean).sum())
    degrees = int((counted.sum(1) - 1).sum())
    return DispersionTest(
        index=statistic / degrees,
        statistic=statistic,
        degrees=degrees,
        over=float(stats.chi2.sf(statistic, degrees)),
        under=float(stats.chi2.cdf(statistic, degrees)),
        mean=float(counts.sum() / counted.sum()),
    )
