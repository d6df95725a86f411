"""From a target to thresholds: which settings are worth trying, in which order, and which of them is taken.

A setting is one error bound per layer group. Settings are ordered by what they are expected to cost, so that a target
is met by searching along one line whatever the number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy import stats
from torch import Tensor

BOUNDS = (0.0, 0.02, 0.05, *(number / 40 for number in range(3, 13)), 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0)
"""Bounds that are considered; between two of them the number of shared blocks hardly changes."""

TOKEN_SLACK = 1.5
"""A token may be off by so many times the bound of its block: the ratio of the two bounds of the preset `safe`."""

Setting = tuple[float, ...]


def effective_error(key: Tensor, value: Tensor, token: Tensor) -> Tensor:
    """The least bound under which a block may be served, from relative errors of its K, its V and its worst token."""
    return torch.maximum(torch.maximum(key, value), token / TOKEN_SLACK)


def cover(error: Tensor, valid: Tensor, bound: float) -> Tensor:
    """Online search on known errors: each block, in order, is served by the nearest representative within `bound`.

    A block that none serves becomes a representative.

    Args:
        error: `[P, N, N]`, entry `[p, i, j]` for block `i` read from block `j`'s page.
        valid: `[P, N]`.

    Returns:
        The column of the block that serves each block, `[P, N]`; its own where it keeps its page, -1 where none is.
    """
    lines, count = valid.shape
    served_by = torch.full((lines, count), -1)
    resident = torch.zeros(lines, count, dtype=torch.bool)
    for column in range(count):
        nearest, which = error[:, column].masked_fill(~resident, math.inf).min(1)
        shared = (nearest <= bound) & valid[:, column]
        alone = valid[:, column] & ~shared
        served_by[:, column] = torch.where(shared, which, torch.where(alone, column, -1))
        resident[:, column] = alone
    return served_by


def acceptance_and_distortion(error: Tensor, valid: Tensor, bound: float) -> tuple[float, float]:
    """Share of blocks served by another's page under `bound`, and the mean squared error over all blocks."""
    served_by = cover(error, valid, bound)
    blocks = int(valid.sum())
    if not blocks:
        return 0.0, 0.0
    taken = error.gather(2, served_by.clamp(min=0)[:, :, None]).squeeze(2)[valid].double()
    own = (served_by == torch.arange(valid.shape[1]))[valid]
    return 1 - int(own.sum()) / blocks, float(taken.square().sum()) / blocks


def settings_by_cost(errors: Tensor, valid: Tensor, sensitivity: Sequence[float]) -> list[Setting]:
    """Settings from the most careful to the boldest, each the best one for its price.

    With one group these are the `BOUNDS` that change what is shared. With several, a setting maximises
    `saved - price * cost` over the bounds of every group alone, for one `price` common to all: the Lagrangian of "save
    most at a given total cost". The cost of a group is its distortion times its sensitivity, because small independent
    errors add up in KL to second order.

    Args:
        errors: `[groups, P, N, N]`.
        sensitivity: KL per unit of distortion, by group.

    Returns:
        Settings, that of exact duplicates only first.
    """
    if len(errors) == 1:
        outcome = {acceptance_and_distortion(errors[0], valid, bound): (bound,) for bound in reversed(BOUNDS)}
        return sorted(outcome.values())
    found = [[acceptance_and_distortion(error, valid, bound) for bound in BOUNDS] for error in errors]
    saved = torch.tensor([[acceptance for acceptance, _ in row] for row in found])
    cost = torch.tensor(
        [[distortion * weight for _, distortion in row] for row, weight in zip(found, sensitivity, strict=True)]
    )
    ladder: dict[Setting, float] = {(BOUNDS[0],) * len(errors): 0.0}
    for exponent in range(60, -81, -2):
        choice = (saved - 10 ** (exponent / 10) * cost).argmax(1)
        ladder.setdefault(
            tuple(BOUNDS[index] for index in choice.tolist()),
            float(cost.gather(1, choice[:, None]).sum()),
        )
    return sorted(ladder, key=lambda setting: (ladder[setting], setting))


def last_that_holds(settings: Sequence[Setting], holds: Callable[[Setting], bool]) -> Setting | None:
    """The boldest setting that `holds`, by bisection: it is taken to hold up to some point and not after it."""
    low, high = -1, len(settings)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(settings[middle]):
            low = middle
        else:
            high = middle
    return settings[low] if low >= 0 else None


def upper_mean(values: Sequence[float], further: int, confidence: float = 0.95) -> float:
    """What the mean of `further` more values stays below with `confidence`.

    The one-sided prediction limit of Student's t for the difference of two means, of `n` values known and `m` to come:
    `mean + t * s * sqrt(1 / n + 1 / m)`. That holds for values near normal; of skewed ones more than 5% exceed it: 13%
    to 17% of lognormal means (sigma 1, n of 32 and 8). Infinite for fewer than two values.
    """
    if len(values) < 2:
        return math.inf
    known = torch.tensor(values, dtype=torch.float64)
    spread = float(known.std()) * math.sqrt(1 / len(values) + 1 / further)
    return float(known.mean()) + float(stats.t.ppf(confidence, len(values) - 1)) * spread
