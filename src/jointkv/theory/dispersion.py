"""Whether the residents that a new block matches are Poisson in number, which the paper's Corollary 1 assumes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jointkv.errors import BadInput
from jointkv.theory.rate import pair_matrix


@dataclass(frozen=True)
class DispersionTest:
    """Are the numbers of matches per block Poisson?

    Attributes:
        index: variance over mean of the counts, pooled over positions; 1 for Poisson, above 1 if matches cluster,
            below 1 if they are too even (match probability q not small: a binomial count has 1 - q).
        degrees: of the chi-square test.
        over, under: p values against clustering and against evenness.
    """

    index: float
    degrees: int
    over: float
    under: float

    @property
    def p_value(self) -> float:
        """Two-sided p value."""
        return min(1.0, 2 * min(self.over, self.under))


def dispersion_test(accepted: ArrayLike, valid: ArrayLike | None = None, *, seed: int = 0) -> DispersionTest:
    """Test the assumption behind Corollary 1: residents that a block matches, exceedances of a threshold, are Poisson.

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
    mean = counts.sum(1, keepdims=True) / counted.sum(1, keepdims=True)
    statistic = float((np.where(counted, counts - mean, 0.0) ** 2 / mean).sum())
    degrees = int((counted.sum(1) - 1).sum())
    over, under = float(stats.chi2.sf(statistic, degrees)), float(stats.chi2.cdf(statistic, degrees))
    return DispersionTest(statistic / degrees, degrees, over, under)
