"""Greedy answers of the arms compared: with those of the large pool, and with the same arm's in other rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean

from jointkv.bench.arms import LARGE_POOL
from jointkv.bench.result import Arm, Fidelity, Load

Outputs = Mapping[tuple[str, str, int], Sequence[str]]
"""Texts in request order, by arm, load and round. The requests are the same in all of them."""


def compare_outputs(outputs: Outputs, arms: Sequence[Arm], loads: Sequence[Load]) -> list[Fidelity]:
    """Each arm against `large_pool` (or `stock`, or the first arm) in equal rounds, and against itself in others.

    What has no pair of runs is left out.
    """
    names = [arm.name for arm in arms]
    reference = next((name for name in (LARGE_POOL, "stock") if name in names), names[0])
    found = []
    for load in loads:
        rounds = sorted({number for _, label, number in outputs if label == load.label})
        for name in names:
            if name != reference:
                equal_rounds = [((name, load.label, number), (reference, load.label, number)) for number in rounds]
                found += _fidelity(outputs, name, reference, load.label, equal_rounds)
        for name in names:
            other_rounds = [
                ((name, load.label, one), (name, load.label, other)) for one, other in combinations(rounds, 2)
            ]
            found += _fidelity(outputs, name, name, load.label, other_rounds)
    return found


def common_prefix(one: str, other: str) -> float:
    """Characters that both texts begin with, over those of the longer one; two empty texts are the same."""
    shorter, longer = sorted((len(one), len(other)))
    same = next((place for place in range(shorter) if one[place] != other[place]), shorter)
    return same / longer if longer else 1.0


def _fidelity(
    outputs: Outputs, arm: str, against: str, load: str, keys: Sequence[tuple[tuple[str, str, int], ...]]
) -> list[Fidelity]:
    texts = [
        pair
        for one, other in keys
        if one in outputs and other in outputs
        for pair in zip(outputs[one], outputs[other], strict=True)
    ]
    if not texts:
        return []
    return [
        Fidelity(
            arm=arm,
            against=against,
            load=load,
            equal=fmean(one == other for one, other in texts),
            common_prefix=fmean(common_prefix(one, other) for one, other in texts),
            pairs=len(texts),
        )
    ]
