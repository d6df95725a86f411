"""Relative error of a pair of blocks from its cosine, and its expectation above a threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from jointkv.errors import BadInput
from jointkv.theory.rate import Numbers

Serving = Literal["projection", "direction", "resident"]
GRID = 301


def pair_error(cosine: ArrayLike, serving: Serving = "resident", norm_ratio: ArrayLike = 1.0) -> Numbers:
    """Relative error `|x - x^| / |x|` of a block x whose partner y makes the cosine c with it.

    - `"resident"`: `x^ = y`. `|x - y|^2 / |x|^2 = 1 - 2 c r + r^2` with `r = |y| / |x|`. Least at r = c, see next.
    - `"projection"`: `x^ = c |x| y/|y|`, the best that y's direction can do at any scale: `sqrt(1 - c^2)`.
    - `"direction"`: both read the mean of their unit vectors, normalised, times their own norm (paper, Algorithm 1).
      It halves the angle: its cosine with either is `sqrt((1 + c) / 2)`, and two unit vectors of cosine g are
      `sqrt(2 - 2 g)` apart. The norm ratio plays no part.

    Args:
        cosine: in [-1, 1].
        norm_ratio: `|y| / |x|`, only for `"resident"`.

    Raises:
        BadInput: unknown `serving`, or a cosine outside [-1, 1].
    """
    c, ratio = np.broadcast_arrays(np.asarray(cosine, dtype=float), np.asarray(norm_ratio, dtype=float))
    if not (np.abs(c) <= 1).all():
        raise BadInput("cosines must lie in [-1, 1]")
    if serving == "resident":
        # (1 - r)^2 + 2 r (1 - c) keeps its digits where blocks are nearly equal.
        return np.sqrt((1 - ratio) ** 2 + 2 * ratio * (1 - c))
    if serving == "projection":
        return np.sqrt((1 - c) * (1 + c))
    if serving == "direction":
        # 2 - 2 cos(angle / 2) = 4 sin^2(angle / 4).
        return 2 * np.sin(np.arccos(c) / 4)
    raise BadInput(f"serving: {serving!r} is none of {', '.join(get_args(Serving))}")


def expected_error(
    exceedance: Callable[[Numbers], Numbers],
    threshold: float,
    serving: Serving = "resident",
    *,
    norm_ratio_deviation: float = 0.0,
) -> float:
    """Mean relative error of pairs whose cosine exceeds `threshold`.

    `E[e(c) | c >= t] = int_t^1 e(c) dF(c) / q(t)`, as a Riemann-Stieltjes sum over steps of the exceedance function q,
    so that an atom at 1 (equal blocks) counts at its own error. If norm ratios vary by a relative standard deviation s,
    independently of c, e^2 of a resident page has mean `s^2 + 2 (1 - c)` (r = 1 + s z): then the root of that
    mean is used.

    Args:
        exceedance: q, for example `SimilarityTail.exceedance`.

    Returns:
        NaN if no pair exceeds the threshold.
    """
    if not -1 <= threshold <= 1:
        raise BadInput(f"threshold {threshold} is no cosine")
    # Finer towards 1, where errors change as the root of 1 - c.
    grid = 1 - (1 - threshold) * np.linspace(1, 0, GRID) ** 2
    chance = exceedance(grid)
    if chance[0] <= 0:
        return float("nan")
    middle = (grid[:-1] + grid[1:]) / 2
    points = np.append(middle, 1.0)
    errors = pair_error(points, serving)
    if serving == "resident":
        errors = np.sqrt(errors**2 + norm_ratio_deviation**2)
    weights = np.append(chance[:-1] - chance[1:], chance[-1])
    return float((errors * weights).sum() / chance[0])
