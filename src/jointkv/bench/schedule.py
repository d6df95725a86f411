"""Runs in turns: the order of arms within a round, an estimate of the time left, and where progress goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Protocol, TypeVar

ArmType = TypeVar("ArmType")


class Watcher(Protocol):
    """Where progress goes."""

    def start(self, description: str) -> None:
        """The next run begins."""

    def part(self, fraction: float) -> None:
        """Of the present run `fraction` is done."""

    def say(self, line: str) -> None:
        """A line that stays."""


def round_order(arms: Sequence[ArmType], number: int) -> tuple[ArmType, ...]:
    """The order of round `number`, from 0: rotated, so that no arm always follows the same one or comes first."""
    turn = number % len(arms)
    return (*arms[turn:], *arms[:turn])


def seconds_left(spent: Mapping[str, Sequence[float]], remaining: Sequence[str]) -> float | None:
    """Estimate from the seconds `spent` on runs by arm; an arm not seen yet counts as the mean of the others."""
    if not spent:
        return None
    typical = fmean(fmean(seconds) for seconds in spent.values())
    return sum(fmean(spent[arm]) if arm in spent else typical for arm in remaining)


def about(seconds: float) -> str:
    """A duration as one would say it."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
