"""Online adaptation: while serving, hold the distortion that calibration promised by moving the bound, with hysteresis.

A profile stands for a distortion: the mean squared relative error over all blocks. To second order the KL of the next
token is proportional to it (a drift of the attention output is linear in the error, and KL is quadratic around its
minimum), so traffic with more distortion than calibrated costs more KL than promised, and less leaves room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jointkv.errors import IntegrityError, InvalidPolicy
from jointkv.policy.profile import GroupThresholds, Profile

Direction = Literal["tighten", "loosen"]

Limit = float | Sequence[float] | None

NEGLIGIBLE = 1e-4
"""A mean squared error of 0.01 squared."""


@dataclass(frozen=True)
class Move:
    """The bound was multiplied by another factor.

    Attributes:
        factor: on the thresholds of the profile, from now on.
        distortion, acceptance: of the window that led to it.
    """

    direction: Direction
    factor: float
    distortion: float
    acceptance: float


@dataclass
class BoundController:
    """Watches one layer group. The thresholds in force are those of the profile times `factor`.

    After each window of `window` blocks the live distortion is compared with the profile's. Outside the dead band
    `[1 / band, band]` for `patience` windows in a row the bound moves one step; inside it, nothing moves. It tightens
    as far as needed and comes back to the profile's bound when that is not needed any more. It goes beyond the
    profile's bound up to `ceiling` only, and only while the live acceptance is at least half of the calibrated one:
    traffic in which little is accepted is not the traffic that was calibrated, and a looser bound would begin to accept
    what was never measured.

    Args:
        distortion, acceptance: what the profile expects, see `jointkv.policy.profile.GroupThresholds`. A distortion
            below `NEGLIGIBLE` counts as that: rounding alone exceeds it.
        ceiling: largest factor, from the user's bound.
    """

    distortion: float
    acceptance: float
    ceiling: float = 1.0
    window: int = 256
    band: float = 1.5
    patience: int = 2
    step: float = 0.85
    factor: float = 1.0
    moves: dict[Direction, int] = field(default_factory=lambda: {"tighten": 0, "loosen": 0})
    _blocks: int = 0
    _served: int = 0
    _squared_error: float = 0.0
    _streak: int = 0

    def __post_init__(self) -> None:
        self.factor = min(self.factor, self.ceiling)

    def observe(self, blocks: int, served: int, squared_error: float) -> Move | None:
        """Add `blocks` considered, `served` of them by another's page, with a sum of squared relative errors.

        Returns:
            The move, if a window ended and led to one.
        """
        self._blocks += blocks
        self._served += served
        self._squared_error += squared_error
        if self._blocks < self.window:
            return None
        distortion, acceptance = self._squared_error / self._blocks, self._served / self._blocks
        self._blocks = self._served = 0
        self._squared_error = 0.0
        self._streak = self._next_streak(distortion, acceptance)
        if abs(self._streak) < self.patience:
            return None
        tighten = self._streak > 0
        self._streak = 0
        factor = self.factor * self.step if tighten else self._loosened()
        if factor == self.factor:
            return None
        self.factor = factor
        direction: Direction = "tighten" if tighten else "loosen"
        self.moves[direction] += 1
        return Move(direction, factor, distortion, acceptance)

    def _next_streak(self, distortion: float, acceptance: float) -> int:
        """Windows in a row above the band (positive) or below it (negative)."""
        expected = max(self.distortion, NEGLIGIBLE)
        if distortion > expected * self.band:
            return max(self._streak, 0) + 1
        alike = self.factor < 1 or 2 * acceptance >= self.acceptance
        if distortion < expected / self.band and alike:
            return min(self._streak, 0) - 1
        return 0

    def _loosened(self) -> float:
        """One step up, stopping at the profile's bound on the way."""
        factor = self.factor / self.step
        return min(self.ceiling, 1.0 if self.factor < 1 < factor else factor)

    def check_integrity(self) -> None:
        """Raises IntegrityError when the factor left its range."""
        if not 0 <= self.factor <= self.ceiling or self._blocks >= self.window:
            raise IntegrityError(f"a bound factor of {self.factor} with a ceiling of {self.ceiling}")


class Adaptation:
    """The bounds in force of every layer group, while a profile is served.

    Args:
        profile: where the thresholds and the expectations come from.
        limit: the user's bound on a block's relative error, one for all groups or one each; no move exceeds it.
            None: the profile's own thresholds.
        token_limit: the user's bound on a token's, likewise.

    Raises:
        InvalidPolicy: a limit that is no number of at least 0, or other than one for each group.
    """

    def __init__(self, profile: Profile, limit: Limit = None, token_limit: Limit = None) -> None:
        self.groups: tuple[GroupThresholds, ...] = profile.groups
        limits = _per_group(limit, len(self.groups), "max_relative_error")
        self._token_limits = _per_group(token_limit, len(self.groups), "max_token_error")
        self.controllers = [
            BoundController(group.distortion, group.acceptance, _ceiling(group, most))
            for group, most in zip(self.groups, limits, strict=True)
        ]

    def bounds(self, group: int) -> tuple[float, float]:
        """The bound on blocks and the bound on tokens that are in force; that on tokens is never loosened."""
        factor, of, token = self.controllers[group].factor, self.groups[group], self._token_limits[group]
        return factor * of.max_relative_error, min(1.0, factor) * (of.max_token_error if token is None else token)

    def observe(self, group: int, blocks: int, errors: Sequence[float]) -> Move | None:
        """Note that of `blocks` considered blocks those with `errors` were served by another's page.

        Args:
            errors: as calibration counts them, see `jointkv.theory.calibrate.effective_error`.
        """
        return self.controllers[group].observe(blocks, len(errors), sum(error * error for error in errors))

    def describe(self, group: int, move: Move) -> str:
        """A line for the log."""
        expected = self.groups[group]
        return (
            f"{'tightened' if move.direction == 'tighten' else 'loosened'} the bound of layer group {group} to "
            f"{self.bounds(group)[0]:.3f}: mean squared error of blocks {move.distortion:.2g}, calibrated "
            f"{expected.distortion:.2g}; {move.acceptance:.0%} of blocks shared, calibrated {expected.acceptance:.0%}"
        )

    @property
    def moves(self) -> dict[Direction, int]:
        """How often any bound was tightened and loosened."""
        kinds: tuple[Direction, ...] = ("tighten", "loosen")
        return {kind: sum(one.moves[kind] for one in self.controllers) for kind in kinds}

    def check_integrity(self) -> None:
        """Raises IntegrityError when a factor left its range."""
        for controller in self.controllers:
            controller.check_integrity()


def _per_group(limit: Limit, groups: int, name: str) -> tuple[float | None, ...]:
    limits = (limit,) * groups if limit is None or isinstance(limit, int | float) else tuple(limit)
    if len(limits) != groups:
        raise InvalidPolicy(f"{name}: {len(limits)} bounds for the {groups} layer groups of the profile")
    if any(one is not None and not one >= 0 for one in limits):
        raise InvalidPolicy(f"{name}: {limit!r} is no number of at least 0")
    return limits


def _ceiling(group: GroupThresholds, limit: float | None) -> float:
    if limit is None or not group.max_relative_error:
        return 1.0
    return limit / group.max_relative_error
