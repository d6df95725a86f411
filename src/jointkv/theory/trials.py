"""Many licences at once: what becomes of them on traffic of a known kind, by simulation.

`Licence` takes one audit at a time; here each step is an audit of every licence. Both agree, audit by audit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import LayoutError
from jointkv.theory.confidence import RISES, STEPS, Array, log_growth, log_mixture, rise_bets, steps_above
from jointkv.theory.licence import Licence, error_chance

Draw = Callable[[np.random.Generator, float, tuple[int, int]], Array]

STREAK = 0.9
"""Chance of the kind "streaks" that a share is that of the audit before."""


def _some_blocks(part: float) -> Draw:
    def draw(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Array:
        return np.where(rng.random(shape) < mean / part, part, 0.0)

    return draw


def _each_block(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Array:
    return rng.binomial(20, mean, shape) / 20


def _smooth(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Array:
    return rng.beta(0.5, 0.5 * (1 - mean) / mean, shape)


def _streaks(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Array:
    shares = _some_blocks(0.5)(rng, mean, shape)
    again = rng.random(shape) < STREAK
    for step in range(1, shape[1]):
        shares[:, step] = np.where(again[:, step], shares[:, step - 1], shares[:, step])
    return shares


INDEPENDENT: dict[str, Draw] = {
    "all blocks or none": _some_blocks(1.0),
    "half of them or none": _some_blocks(0.5),
    "a tenth of them or none": _some_blocks(0.1),
    "each of 20 by itself": _each_block,
    "any share": _smooth,
}
"""Shares with a given mean of at most 0.1, `[licences, audits]`, each independent of all others."""

DRAWS: dict[str, Draw] = {**INDEPENDENT, "streaks of half or none": _streaks}
"""The same, and shares that repeat; only over long times is their average the mean."""


@dataclass(frozen=True)
class Fates:
    """What became of each licence.

    Attributes:
        granted: after each audit, bool `[licences, audits]`.
        lost_to_limit, lost_to_rise: how often each was lost, `[licences]`, see `jointkv.theory.licence.Licence.cause`.
        alarms: how often a rise was found, with or without a licence, `[licences]`.
        first_loss: number of the audit that took the licence away first; one more than there are where none did.
    """

    granted: NDArray[np.bool_]
    lost_to_limit: NDArray[np.int64]
    lost_to_rise: NDArray[np.int64]
    alarms: NDArray[np.int64]
    first_loss: NDArray[np.int64]

    @property
    def first_grant(self) -> NDArray[np.int64]:
        """Number of the audit that granted the licence first; one more than there are where none did."""
        found = self.granted.any(1)
        return np.where(found, self.granted.argmax(1), self.granted.shape[1]) + 1


def follow(shares: Array, licence: Licence) -> Fates:
    """Give each of many copies of `licence`, which is not changed, its own audits.

    Args:
        shares: in [0, 1], `[licences, audits]`.

    Raises:
        LayoutError: another number of dimensions.
    """
    if shares.ndim != 2:
        raise LayoutError(f"shares {list(shares.shape)} are not [licences, audits]")
    many, audits = shares.shape
    rate, threshold = licence.miss_rate, licence.detector.threshold
    bets = np.tile(licence.sequence.log_bets(rate), (many, 1))
    evidence = np.tile(licence.detector.log_evidence, (many, 1))
    attempts = np.full(many, licence.attempts)
    had = np.full(many, licence.granted)
    granted = np.zeros((many, audits), dtype=np.bool_)
    to_limit, to_rise, alarms = (np.zeros(many, dtype=np.int64) for _ in range(3))
    first_loss = np.full(many, audits + 1)
    chances = np.array(
        [error_chance(attempt, licence.confidence) for attempt in range(1, audits + licence.attempts + 2)]
    )
    for step in range(audits):
        share = shares[:, step]
        bets += log_growth(rate, steps_above(share) / STEPS)
        evidence = np.maximum(evidence, 0) + np.log1p(rise_bets(rate) * (share[:, None] / rate - 1))
        rise = np.logaddexp.reduce(evidence, axis=1) >= math.log(RISES * threshold)
        holds = (log_mixture(bets) >= -np.log(chances[attempts - 1])) & ~rise
        bets[rise], evidence[rise] = 0.0, 0.0
        attempts += rise
        alarms += rise
        lost = had & ~holds
        to_limit += lost & ~rise
        to_rise += lost & rise
        first_loss[lost & (first_loss > audits)] = step + 1
        granted[:, step] = had = holds
    return Fates(granted, to_limit, to_rise, alarms, first_loss)
