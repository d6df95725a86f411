"""Distinct blocks expected of a batch, from the real pairs of a sample: assumes neither independence nor transitivity.

Rarefaction is the ecologist's word for expected species of a smaller sample (Hurlbert 1971; Chao et al. 2014). Here
n of the N sampled requests are drawn without replacement, in random order, and online search runs on their real pairs.
Matches of one request at several positions stay together, so whatever clusters requests is in the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from jointkv.errors import BadInput
from jointkv.theory.rate import Method, Numbers, RatePrediction, check_size, pair_matrix

LEAST_REQUESTS = 8
"""Requests below which halves of the sample say nothing about its variance."""

WORD = 64


def rarefaction(
    accepted: ArrayLike,
    valid: ArrayLike | None,
    sizes: Sequence[int],
    *,
    draws: int = 200,
    seed: int = 0,
) -> list[RatePrediction]:
    """Predict the ratio of fresh batches of `sizes` requests from a sample of N requests of the same population.

    Args:
        accepted: `[P, N, N]` bool; `[i, j]`: block j may serve block i as it stands. Layer groups that decide apart
            are further positions. From a matrix of errors: `error <= bound`.
        valid: `[P, N]` bool, default all; False where a request is shorter.
        sizes: batch sizes n; beyond N the curve is extrapolated, see `_extrapolate`.

    **Interval.** With D distinct blocks, T blocks and ratio R = T / D at size n, a batch deviates from the mean by
    `d log R = -(dD - dT D/T) / D = -e / D`. Three steps give the variance of `e`:

    1. Draws of size m out of N share requests, so their variance is too small. A statistic that is nearly a sum over
       requests (first-order part of Hoeffding's decomposition) has subsample variance `Var (1 - m/N)`; higher orders
       lose less, so dividing by `1 - m/N` is on the safe side. m = n up to N/2. Beyond, nothing is left to vary
       (all draws of N are the same set), so m = N/2.
    2. From m to n the variance of a sum grows by n/m. D grows slower as it saturates: safe again.
    3. The prediction is an average over a finite sample and has a variance of its own, n/N times that of a batch
       (first-order part of a U-statistic of degree n). The error of predicting one fresh batch has both: `1 + n/N`.

    The 95% interval is `R exp(±t sd(e) / D)`, t of Student with N - 1 degrees of freedom. It knows only what the sample
    shows: a kind of request that is rarer than about 3 / N may be missing from it (rule of three), and where all
    requests are alike the interval has no width.

    Raises:
        BadInput: fewer than `LEAST_REQUESTS` requests, shapes that do not fit, or a size below 1.
    """
    pairs, present = pair_matrix(accepted, valid)
    sampled = present.shape[1]
    if sampled < LEAST_REQUESTS:
        raise BadInput(f"an interval for the ratio needs at least {LEAST_REQUESTS} requests, got {sampled}")
    if draws < 2:
        raise BadInput(f"draws must be at least 2, got {draws}")
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(sampled), (draws, 1)), axis=1)
    distinct, total = (steps.cumsum(1) for steps in arrivals(pairs, present, order))
    quantile = stats.t.ppf(0.975, sampled - 1)
    return [_predict(distinct, total, size, quantile) for size in sizes]


def arrivals(
    pairs: NDArray[np.bool_], present: NDArray[np.bool_], order: NDArray[np.int_]
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Online search over requests arriving in some orders: new residents and blocks at each arrival.

    A block is new unless a resident accepts it, and then is resident itself. Which resident serves it changes no
    later decision, so it is not recorded. Residents are kept as bits, 64 requests in a word.

    Args:
        pairs: `[P, N, N]` bool, False for pairs of missing blocks.
        present: `[P, N]` bool.
        order: `[draws, n]`, distinct requests on each line.

    Returns:
        Sums over positions, `[draws, n]` each.
    """
    positions, sampled = present.shape
    words = -(-sampled // WORD)
    padded = np.zeros((positions, sampled, words * WORD), dtype=bool)
    padded[:, :, :sampled] = pairs
    servers = np.packbits(padded, axis=2, bitorder="little").view("<u8")
    resident = np.zeros((positions, len(order), words), dtype="<u8")
    new_blocks, blocks = np.zeros(order.shape, dtype=int), np.zeros(order.shape, dtype=int)
    draw = np.arange(len(order))
    for step, request in enumerate(order.T):
        arriving = present[:, request]
        new = arriving & ~(servers[:, request] & resident).any(2)
        bit = np.left_shift(np.uint64(1), (request % WORD).astype(np.uint64))
        resident[:, draw, request // WORD] |= new * bit
        new_blocks[:, step], blocks[:, step] = new.sum(0), arriving.sum(0)
    return new_blocks, blocks


def _predict(distinct: NDArray[np.int_], total: NDArray[np.int_], size: int, quantile: float) -> RatePrediction:
    """One prediction from distinct blocks and blocks after each arrival, `[draws, N]`."""
    check_size(size)
    sampled = distinct.shape[1]
    mean_distinct, mean_total = distinct.mean(0), total.mean(0)
    method: Method = "rarefaction" if size <= sampled else "extrapolation"
    blocks = float(mean_total[-1] * size / sampled)
    if blocks == 0:
        return RatePrediction(size, 1.0, 1.0, 1.0, 0.0, method)
    if size <= sampled:
        expected = fewest = most = float(mean_distinct[size - 1])
    else:
        expected, fewest, most = _extrapolate(mean_distinct, mean_total, size)
    part = min(size, sampled // 2)
    shift = (distinct[:, part - 1] - mean_distinct[part - 1]) - expected / blocks * (
        total[:, part - 1] - mean_total[part - 1]
    )
    variance = shift.var(ddof=1) / (1 - part / sampled) * (size / part) * (1 + size / sampled)
    spread = np.exp(quantile * np.sqrt(variance) / expected)
    ratio = blocks / expected
    return RatePrediction(
        requests=size,
        ratio=ratio,
        low=max(1.0, float(blocks / most / spread)),
        high=min(float(size), float(blocks / fewest * spread)),
        distinct=expected,
        method=method,
    )


def _extrapolate(mean_distinct: Numbers, mean_total: Numbers, size: int) -> tuple[float, float, float]:
    """Distinct blocks of `size` > N requests: expected, and the fewest and most that the sample leaves plausible.

    The chance that the k-th block of a position is new is fitted by

        s(k) = w + (1 - w) (1 + a (k - 1))^-b

    a share w of blocks that are nobody else's, and a population that ends up shared: b = 1 is the Poisson model
    (`dD/dk = e^(-qD) = 1 / (1 + qk)`, see rate.py), large b a fixed number of clusters (exponential), small b match
    probabilities of many magnitudes. The sample cannot tell what lies beyond it, so the interval spans two more
    continuations: s stays as it was over the last quarter (most distinct blocks; s only falls when requests are alike
    in distribution), or w = 0 (fewest: everything ends up shared). How far one may extrapolate at all: about twice N
    by Chao et al. 2014.
    """
    sampled = len(mean_distinct)
    per_arrival = mean_total[-1] / sampled
    step = np.arange(1.0, sampled + 1)
    chance = np.diff(mean_distinct, prepend=0.0) / per_arrival
    beyond = np.arange(sampled + 1.0, size + 1)

    def new_chance(k: Numbers, rate: float, power: float, own: float = 0.0) -> Numbers:
        return own + (1 - own) * (1 + np.exp(rate) * (k - 1)) ** -power

    def added(start: list[float], low: list[float], high: list[float]) -> float:
        # The fit is to the whole curve; only its shape is used beyond N, so that the curve does not jump there.
        fitted, _ = optimize.curve_fit(new_chance, step, chance, p0=start, bounds=(low, high), max_nfev=5000)
        return float(per_arrival * new_chance(beyond, *fitted).sum())

    last = chance[-max(1, sampled // 4) :].mean()
    most = float(per_arrival * last * len(beyond))
    middle = added([0.0, 1.0, 0.3], [-20.0, 0.3, 0.0], [20.0, 8.0, 1.0])
    fewest = min(middle, added([0.0, 1.0], [-20.0, 0.0], [20.0, 8.0]))
    known = float(mean_distinct[-1])
    return known + min(middle, most), known + min(fewest, most), known + most
