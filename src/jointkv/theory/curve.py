"""Rate-distortion curves R(D): what ratio an error bound buys, and how far served blocks are from the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jointkv.errors import BadInput
from jointkv.theory.rarefaction import rarefaction
from jointkv.theory.rate import Numbers, RatePrediction, pair_matrix, predict_poisson

SEARCH_DRAWS = 16
"""Arrival orders over which distortion is averaged: it varies much less between them than the ratio does."""


@dataclass(frozen=True)
class CurvePoint:
    """One bound on the relative error, what it buys, and what it costs.

    Attributes:
        bound: largest relative error of a served block.
        rate: predicted ratio, see `rarefaction`.
        poisson: the ratio that the Poisson model predicts from the same pairs.
        distortion: mean squared relative error over all blocks; a block on its own page counts 0.
        measured_ratio, measured_distortion: of a run on other requests, None where not measured.
    """

    bound: float
    rate: RatePrediction
    poisson: RatePrediction
    distortion: float
    measured_ratio: float | None = None
    measured_distortion: float | None = None


@dataclass(frozen=True)
class RateDistortionCurve:
    """R(D) of one layer group (or of all: group None), in order of rising bound."""

    group: int | None
    points: tuple[CurvePoint, ...]

    def with_measured(self, measured: Mapping[float, tuple[float, float]]) -> RateDistortionCurve:
        """The curve with measured (ratio, distortion) put beside the points of the bounds given.

        Raises:
            BadInput: a bound that the curve has no point for.
        """
        unknown = set(measured) - {point.bound for point in self.points}
        if unknown:
            raise BadInput(f"the curve has no point at bound {min(unknown):g}")
        points = [
            replace(point, measured_ratio=measured[point.bound][0], measured_distortion=measured[point.bound][1])
            if point.bound in measured
            else point
            for point in self.points
        ]
        return replace(self, points=tuple(points))


def rate_distortion(
    errors: ArrayLike,
    valid: ArrayLike | None,
    bounds: Sequence[float],
    *,
    requests: int | None = None,
    group: int | None = None,
    draws: int = 200,
    seed: int = 0,
) -> RateDistortionCurve:
    """The curve of one layer group for batches of `requests` requests (default: as many as sampled).

    R is operational: what online search with resident representatives reaches, not the infimum over all codes that
    Shannon's R(D) is. D is the distortion at the size of the sample if `requests` is larger.

    Args:
        errors: `[P, N, N]`, entry `[i, j]` the relative error of block i served by block j as it stands, infinity
            if they may not be merged.
        valid: `[P, N]` bool, default all.
        bounds: errors up to which a pair is accepted.

    Raises:
        BadInput: no bound, a negative one, or what `rarefaction` raises.
    """
    error = np.asarray(errors, dtype=np.float32)
    size = error.shape[-1] if requests is None else requests
    if not bounds or min(bounds) < 0:
        raise BadInput("bounds: give one or more errors of at least 0")
    points = []
    for bound in sorted(set(bounds)):
        accepted, present = pair_matrix(error <= bound, valid)
        points.append(
            CurvePoint(
                bound=float(bound),
                rate=rarefaction(accepted, present, [size], draws=draws, seed=seed)[0],
                poisson=predict_poisson(accepted, present, size),
                distortion=_distortion(np.where(accepted, error, np.inf), present, size, seed),
            )
        )
    return RateDistortionCurve(group, tuple(points))


def _distortion(error: Numbers, present: NDArray[np.bool_], size: int, seed: int) -> float:
    """Mean squared error of all blocks when each is served by the closest resident that may serve it."""
    sampled = error.shape[1]
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(sampled), (SEARCH_DRAWS, 1)), axis=1)[:, : min(size, sampled)]
    resident = np.zeros((len(error), *order.shape[:1], sampled), dtype=bool)
    draw = np.arange(len(order))
    squared, blocks = 0.0, 0
    for request in order.T:
        arriving = present[:, request]
        best = np.where(resident, error[:, request], np.inf).min(2)
        served = np.isfinite(best)
        resident[:, draw, request] = arriving & ~served
        squared += float(np.square(best[served], dtype=float).sum())
        blocks += int(arriving.sum())
    return squared / blocks if blocks else 0.0
