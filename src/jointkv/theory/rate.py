"""How many distinct blocks remain of N: the Poisson model of the paper (Corollary 1), for online search and the tree.

One population: any two blocks match with probability q, pairs independent of one another. What does not fit this
model (clusters of requests, transitive matches) is what `rarefaction.py` is for.

**Continuous limit.** From `dD/dN = e^(-qD)`: `e^(qD) dD = dN`, so `(e^(qD) - 1) / q = N` with D(0) = 0, that is
`D = ln(1 + qN) / q`, good for small q and qN well above q. With `(1-q)^D` in place of `e^(-qD)`, q becomes `-ln(1-q)`.

**Growth of the ratio.** The paper observes that the ratio grows logarithmically with the batch. In the model it is the
number of *distinct blocks* of one population that does, `D ~ ln(1 + qN) / q`, so the ratio `N / D = qN / ln(1 + qN)` is
nearly linear in N once qN is large, and 1 + qN/2 before that. Mixtures differ. If a share w of the blocks is never
shared, the ratio levels off at 1 / w. If match probabilities spread over many orders of magnitude, a block of
probability q begins to be shared near N = 1/q, so that `1 / ratio ~ P(q < 1/N)`, and the ratio follows ln N exactly
where `P(q < x) ~ 1 / ln(1/x)`. Between its rise and its ceiling a broad mixture looks logarithmic over a decade or two
of N; that is as far as the observation follows. The tests show all three cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from jointkv.errors import BadInput

Method = Literal["poisson", "rarefaction", "extrapolation"]
Numbers = NDArray[np.float64]

MOST_MATCHING = 1 - 1e-12
"""Match probabilities are cut here where `-ln(1 - q)` must stay finite."""


@dataclass(frozen=True)
class RatePrediction:
    """Compression ratio expected of a batch.

    Attributes:
        requests: size of the batch.
        ratio: blocks before over distinct blocks after, all positions and layer groups together.
        low, high: interval for the ratio that one fresh batch of this size will show.
        distinct: expected distinct blocks.
        method: `"poisson"` assumes independent pairs, the others do not.
    """

    requests: int
    ratio: float
    low: float
    high: float
    distinct: float
    method: Method


def expected_distinct(match_probability: ArrayLike, blocks: ArrayLike) -> Numbers:
    """Expected distinct blocks after online search over `blocks` blocks: the exact expectation.

    A new block meets D distinct residents and matches none of them with probability `(1-q)^D`; it then becomes the
    next resident. So D is a pure-birth Markov chain, D -> D + 1 with probability `(1-q)^D`, from D = 0. Its
    distribution is carried along step by step. Poisson exceedances of intensity qD (paper, Corollary 1) replace
    `(1-q)^D` by `e^(-qD)`; the two agree to a factor `e^(-q^2 D / 2)`, that is for small q. At q = 1 the
    chain gives the true 1, and the Poisson form ln(1 + N).

    Args:
        match_probability, blocks: broadcast against each other; `blocks` need not be whole (interpolated).

    Raises:
        BadInput: a probability outside [0, 1] or a negative number of blocks.
    """
    q, count = _checked(match_probability, blocks)
    shape, q, count = q.shape, q.ravel(), count.ravel()
    steps = int(np.ceil(count.max(initial=0)))
    miss = (1 - q[:, None]) ** np.arange(steps + 1)
    chance = np.zeros((len(q), steps + 1))
    chance[:, 0] = 1
    means = np.zeros((len(q), steps + 1))
    for step in range(1, steps + 1):
        born = chance[:, :step] * miss[:, :step]
        chance[:, :step] -= born
        chance[:, 1 : step + 1] += born
        means[:, step] = means[:, step - 1] + born.sum(1)
    whole = np.floor(count).astype(int)
    rows = np.arange(len(q))
    low, high = means[rows, whole], means[rows, np.minimum(whole + 1, steps)]
    return (low + (count - whole) * (high - low)).reshape(shape)


def tree_distinct(match_probability: ArrayLike, blocks: ArrayLike) -> Numbers:
    """Expected distinct blocks after tree Fast-Fusion (paper, Algorithm 1).

    Merging two halves of n blocks: each of the right half's D(n) representatives is passed through if it matches none
    of the left half's D(n), else its whole group joins. The halves are independent, hence exactly
    `E D(2n) = E D(n) (1 + E (1-q)^D(n))`, and with D concentrated about its mean

        D(2n) = D(n) (1 + (1-q)^D(n)),  D(1) = 1,

    for unequal halves `D(m+n) = D(m) + D(n) (1-q)^D(m)`. By Jensen this is from below; the gap is of order q/4 of the
    second term. Doubling N adds ln 2 / q in online search, but `D e^(-qD)` here: D grows like ln(log2 N) / q. The tree
    merges more because members follow their representative unasked. With a bound per member (resident
    representatives) they do not, and online search is the better model.
    """
    q, count = _checked(match_probability, blocks)
    return _tree(q, count)


def _tree(q: Numbers, count: Numbers) -> Numbers:
    largest = count.max(initial=0)
    if largest <= 1:
        return count.astype(float)
    left_size = 2.0 ** (np.ceil(np.log2(largest)) - 1)
    left = _tree(q, np.minimum(count, left_size))
    right = _tree(q, np.clip(count - left_size, 0, None))
    return left + right * (1 - q) ** left


def match_probabilities(accepted: ArrayLike, valid: ArrayLike | None = None) -> Numbers:
    """Share of accepted pairs at each position, `[P]`: ordered pairs of different requests that both have a block.

    Args:
        accepted: `[P, N, N]` bool; `[i, j]`: block j may serve block i. From a matrix of errors: `error <= bound`.
        valid: `[P, N]` bool, default all.
    """
    pairs, present = pair_matrix(accepted, valid)
    matched, possible = _pair_counts(pairs, present)
    return matched.sum(1) / np.maximum(possible.sum(1), 1)


def predict_poisson(accepted: ArrayLike, valid: ArrayLike | None, requests: int) -> RatePrediction:
    """Ratio of online search over `requests` requests if pairs matched independently, from each position's own q.

    The 95% interval adds two variances: of one batch about its mean (the chain's variance, about (1 - ratio^-1) D, an
    upper bound for a sum of births that inhibit one another) and of the estimated q (jackknife over requests, Efron &
    Stein 1981). It knows nothing of how wrong independence may be: compare `rarefaction` and `dispersion_test`.

    Raises:
        BadInput: fewer than 3 requests, or shapes that do not fit.
    """
    pairs, present = pair_matrix(accepted, valid)
    sampled = present.shape[1]
    if sampled < 3:
        raise BadInput(f"a jackknife over requests needs at least 3 of them, got {sampled}")
    check_size(requests)
    matched, possible = _pair_counts(pairs, present)
    blocks = requests * present.mean(1)
    distinct = float(expected_distinct(matched.sum(1) / np.maximum(possible.sum(1), 1), blocks).sum())
    left_out = left_out_probabilities(pairs, present)
    blocks_left = requests * (present.sum(1, keepdims=True) - present) / (sampled - 1)
    ratios = np.log(blocks_left.sum(0) / _mean_field(left_out, blocks_left).sum(0).clip(1e-12))
    jackknife = (sampled - 1) * ratios.var()
    total = blocks.sum()
    batch = (1 - distinct / total) / distinct if distinct else 0.0
    ratio = float(total / distinct) if distinct else 1.0
    spread = np.exp(stats.t.ppf(0.975, sampled - 1) * np.sqrt(jackknife + max(batch, 0.0)))
    return RatePrediction(requests, ratio, max(1.0, float(ratio / spread)), float(ratio * spread), distinct, "poisson")


def left_out_probabilities(pairs: NDArray[np.bool_], present: NDArray[np.bool_]) -> Numbers:
    """`match_probabilities` of the sample without request i, for every i: `[P, N]`."""
    matched, possible = _pair_counts(pairs, present)
    # The pairs of request i are missing both as served and as serving block.
    served = pairs.sum(1) - pairs.diagonal(axis1=1, axis2=2)
    left_matched = matched.sum(1, keepdims=True) - matched - served
    return left_matched / np.maximum(possible.sum(1, keepdims=True) - 2 * possible, 1)


def _mean_field(q: Numbers, count: Numbers) -> Numbers:
    """`ln(1 + an) / a` with `a = -ln(1-q)`, shifted so that one block gives 1: cheap, for differences only."""
    rate = -np.log1p(-np.minimum(q, MOST_MATCHING))
    safe = np.where(rate > 0, rate, 1)
    return np.where(rate > 0, 1 + np.log1p(safe * (1 - q) * (count - 1).clip(0)) / safe, count) * np.minimum(count, 1)


def pair_matrix(accepted: ArrayLike, valid: ArrayLike | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """`accepted [P, N, N]` with pairs of missing blocks cleared, and `valid [P, N]`, as arrays on the CPU.

    Raises:
        BadInput: shapes that do not fit.
    """
    pairs = np.asarray(accepted, dtype=bool)
    if pairs.ndim != 3 or pairs.shape[1] != pairs.shape[2]:
        raise BadInput(f"pairs must be [positions, requests, requests], got {list(pairs.shape)}")
    present = np.ones(pairs.shape[:2], dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    if present.shape != pairs.shape[:2]:
        raise BadInput(f"valid must be {list(pairs.shape[:2])}, got {list(present.shape)}")
    return pairs & present[:, :, None] & present[:, None, :], present


def check_size(requests: int) -> None:
    """Raises `BadInput` unless a batch has at least one request."""
    if requests < 1:
        raise BadInput(f"a batch of {requests} requests; at least 1 expected")


def _pair_counts(pairs: NDArray[np.bool_], present: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Accepted and possible partners of each block, `[P, N]` each; a block is no partner of its own."""
    own = pairs.diagonal(axis1=1, axis2=2)
    return (pairs.sum(2) - own).astype(float), present * (present.sum(1, keepdims=True) - 1.0)


def _checked(match_probability: ArrayLike, blocks: ArrayLike) -> tuple[Numbers, Numbers]:
    """Both, broadcast against each other. Raises `BadInput`, see `expected_distinct`."""
    q, count = np.asarray(match_probability, dtype=float), np.asarray(blocks, dtype=float)
    if not ((q >= 0) & (q <= 1)).all():
        raise BadInput("match probabilities must lie in [0, 1]")
    if not ((count >= 0) & np.isfinite(count)).all():
        raise BadInput("numbers of blocks must be finite and not negative")
    q, count = np.broadcast_arrays(q, count)
    return q, count
