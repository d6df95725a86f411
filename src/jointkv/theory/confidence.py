"""Statements about the mean of numbers in [0, 1] that hold at every moment, however often and whenever one looks.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", J. R. Stat. Soc. B 86
(2024), for the limit; Shin, Ramdas and Rinaldo, "E-detectors", New Engl. J. Stat. Data Sci. 2 (2024), for the alarm.
Numbers may depend on each other and their means may move; `mu_i` is the mean of number i given those before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jointkv.errors import BadInput, IntegrityError, InvalidPolicy

Array = NDArray[np.float64]

FRACTIONS: Array = np.array((0.97, 0.8, 0.6, 0.35, 0.15, 0.05))
"""Bets of the limit, over the largest that cannot ruin: the first suits numbers that are 0, the last a mean near m."""

LOG_WEIGHTS: Array = np.log((0.65, 0.14, 0.10, 0.06, 0.03, 0.02))
"""Of the bets: the capital that each begins with. The first has so much that 1.2 times `least_audits` is enough."""

STEPS = 1000
"""Numbers are kept as counts, rounded up to the next of so many steps: the limit is then larger, never smaller."""

BISECTIONS = 30
"""Halvings of [0, 1] in search of the limit."""

RISES = 6
"""Bets of the alarm, each for a rise to another multiple of the rate."""


def check_probability(name: str, value: float) -> None:
    """Raises InvalidPolicy unless `value` lies between 0 and 1."""
    if not 0 < value < 1:
        raise InvalidPolicy(f"{name}: {value!r} is not between 0 and 1")


def check_share(share: float) -> None:
    """Raises BadInput unless `share` is in [0, 1]."""
    if not 0 <= share <= 1:
        raise BadInput(f"a share of {share!r} is not in [0, 1]")


def least_audits(mean: float, confidence: float) -> int:
    """How many numbers, all 0, any method needs before it may say that their mean is below `mean`.

    If each number is 1 with chance `mean`, else 0, then n zeros have the chance `(1 - mean)^n`, which must not exceed
    `1 - confidence`.
    """
    return math.ceil(math.log(1 - confidence) / math.log1p(-mean))


def steps_above(shares: ArrayLike) -> NDArray[np.int64]:
    """Each number rounded up to whole steps of `1 / STEPS`."""
    # 0.05 * 1000 may be a little above 50.
    return np.ceil(np.round(np.asarray(shares, dtype=np.float64) * STEPS, 6)).astype(np.int64)


def log_growth(mean: float, shares: ArrayLike) -> Array:
    """What each number does to the logarithm of each bet against `mean`, `[..., len(FRACTIONS)]`.

    The bet c multiplies its capital by `1 + c (mean - x) / (1 - mean)`, which is at least `1 - c`, falls with x and
    grows with the mean.
    """
    return np.log1p(FRACTIONS * (mean - np.asarray(shares, dtype=np.float64)[..., None]) / (1 - mean))


def log_mixture(log_bets: Array) -> Array:
    """Logarithm of the capital of all bets together: `[..., len(FRACTIONS)]` to `[...]`."""
    total: Array = np.logaddexp.reduce(log_bets + LOG_WEIGHTS, axis=-1)
    return total


class UpperLimit:
    """Upper confidence limit of a mean that may be read after every number.

    Capital `K_t(m) = sum_c w_c prod_(i<=t) (1 + c (m - x_i) / (1 - m))` begins at 1 and is bet against the mean m. Let
    a_i be the factors with mu_i in place of x_i: each product over `prod a_i` is a nonnegative martingale. While the
    average of `mu_1 .. mu_t` is at least m, `prod a_i <= 1` (arithmetic and geometric mean), so K_t(m) is at most a
    mixture of martingales that begins at 1, and by Ville's inequality

        P(at some t: K_t(m) >= 1 / alpha although the average of mu_1 .. mu_t is at least m) <= alpha = 1 - confidence.

    The limit is the least m with that capital. Nothing is assumed of the mu_i, not even that they stay equal. The
    statement is about each m by itself, such as the rate a licence is for. The limit stays above the average of the
    numbers (Jensen's inequality) and comes, with ever more of them, to within about 2.6% of it: half the last bet.

    Args:
        confidence: in (0, 1).

    Raises:
        InvalidPolicy: another confidence.
    """

    def __init__(self, confidence: float) -> None:
        check_probability("confidence", confidence)
        self.confidence = confidence
        self._counts = np.zeros(STEPS + 1, dtype=np.int64)
        self._sum = 0.0
        self._limit: float | None = None

    def observe(self, share: float) -> None:
        """Take the next number.

        Raises:
            BadInput: it is not in [0, 1].
        """
        check_share(share)
        self._counts[int(steps_above(share))] += 1
        self._sum += share
        self._limit = None

    @property
    def count(self) -> int:
        """How many numbers were observed."""
        return int(self._counts.sum())

    @property
    def mean(self) -> float:
        """Their average; 0 of none."""
        return self._sum / max(1, self.count)

    @property
    def limit(self) -> float:
        """The limit, too large by at most `2 ** -BISECTIONS`; 1 where nothing can be said."""
        if self._limit is None:
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (low, middle) if self.excludes(middle) else (middle, high)
            self._limit = high
        return self._limit

    def excludes(self, mean: float) -> bool:
        """Whether the limit is at most `mean`, in (0, 1), at a fraction of the price of `limit`."""
        return bool(log_mixture(self.log_bets(mean)) >= -math.log1p(-self.confidence))

    def log_bets(self, mean: float) -> Array:
        """Logarithm of each bet's capital against `mean`, `[len(FRACTIONS)]`."""
        (seen,) = self._counts.nonzero()
        total: Array = self._counts[seen] @ log_growth(mean, seen / STEPS)
        return total

    def at(self, confidence: float) -> UpperLimit:
        """A copy of it with another confidence.

        Raises:
            InvalidPolicy: a confidence outside (0, 1).
        """
        other = UpperLimit(confidence)
        other._counts, other._sum = self._counts.copy(), self._sum
        return other

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        (seen,) = self._counts.nonzero()
        counts = [[index / STEPS, int(self._counts[index])] for index in seen.tolist()]
        return {"confidence": self.confidence, "sum": self._sum, "counts": counts}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> UpperLimit:
        """The limit that `to_json` saved.

        Raises:
            BadInput: it is no such thing.
        """
        try:
            limit = cls(float(saved["confidence"]))
            for share, count in saved["counts"]:
                limit._counts[range(STEPS + 1).index(round(float(share) * STEPS))] += int(count)
            limit._sum = float(saved["sum"])
            limit.check_integrity()
        except (KeyError, TypeError, ValueError, OverflowError, IntegrityError) as error:
            raise BadInput(f"no saved confidence limit: {error!r}") from error
        return limit

    def check_integrity(self) -> None:
        """Raises IntegrityError when counts and sum cannot belong to the same numbers."""
        rounded, count = float(self._counts @ np.arange(STEPS + 1)) / STEPS, self.count
        # Sums of floats are off by about one part in 1e16 for each number.
        slack = 1e-9 * (1 + count)
        if (self._counts < 0).any() or not rounded - count / STEPS - slack <= self._sum <= rounded + slack:
            raise IntegrityError(f"{count} shares with a sum of {self._sum}, rounded up {rounded}")


class RiseDetector:
    """Alarm that the mean has risen above `rate`, whatever came before.

    Each bet f multiplies `M_t = max(M_(t-1), 1) (1 + f (x_t / rate - 1))`; the alarm is given when the average of all
    M reaches `threshold`. With `R_t = (R_(t-1) + 1) (1 + f (x_t / rate - 1)) >= M_t`, R_t - t does not grow on average
    while `mu_i <= rate`. So, for every kind of numbers:

    - from its start it takes at least `threshold` numbers on average until a false alarm, and one comes within n
      numbers with chance at most `n / threshold`, also where every mu_i is the rate itself;
    - a rise is met by the bet that suits it, after about `ln(RISES * threshold)` over what that bet gains per number.

    Not promised: that a rise is found within a given time, that one too small to matter within a lifetime is found at
    all, and that no alarm is ever false.

    Args:
        rate: in (0, 1).
        threshold: at least 1.

    Attributes:
        log_evidence: ln M of each bet, `[RISES]`.

    Raises:
        InvalidPolicy: another rate or threshold.
    """

    def __init__(self, rate: float, threshold: float) -> None:
        check_probability("rate", rate)
        if not 1 <= threshold < math.inf:
            raise InvalidPolicy(f"threshold: {threshold!r} is no number of at least 1")
        self.rate, self.threshold = rate, threshold
        self._bets = rise_bets(rate)
        self.log_evidence: Array = np.zeros(RISES)

    def observe(self, share: float) -> bool:
        """Take the next number; whether the alarm is given.

        Raises:
            BadInput: the number is not in [0, 1].
        """
        check_share(share)
        self.log_evidence = np.maximum(self.log_evidence, 0) + np.log1p(self._bets * (share / self.rate - 1))
        return self.evidence >= self.threshold

    @property
    def evidence(self) -> float:
        """What is compared with the threshold."""
        return float(np.exp(np.logaddexp.reduce(self.log_evidence)) / RISES)

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        return {"rate": self.rate, "threshold": self.threshold, "log_evidence": self.log_evidence.tolist()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RiseDetector:
        """The detector that `to_json` saved.

        Raises:
            BadInput: it is no such thing.
        """
        try:
            detector = cls(float(saved["rate"]), float(saved["threshold"]))
            detector.log_evidence = np.array([float(value) for value in saved["log_evidence"]])
            detector.check_integrity()
        except (KeyError, TypeError, ValueError, IntegrityError) as error:
            raise BadInput(f"no saved detector of a rise: {error!r}") from error
        return detector

    def check_integrity(self) -> None:
        """Raises IntegrityError when evidence is below what one number can leave of it, or no number."""
        least = np.log1p(-self._bets) - 1e-9
        if self.log_evidence.shape != (RISES,) or not (least <= self.log_evidence).all():
            raise IntegrityError(f"evidence of a rise of {self.log_evidence.tolist()}")


def rise_bets(rate: float) -> Array:
    """The bets f of a `RiseDetector`, all between `rate` and 1.

    The best bet where numbers are 0 or 1 with mean q is `(q - rate) / (1 - rate)`: about `rate` for a doubled mean. The
    more even the numbers, the higher it is.
    """
    return np.geomspace(rate, 1 - (1 - rate) / 10, RISES)
