"""Greedy answers of the arms compared: with those of the large pool, and with the same arm's in other rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile
from statistics import fmean

from jointkv.bench.arms import LARGE_POOL
from jointkv.bench.result import Arm, Fidelity, Key, Load

Outputs = Mapping[Key, Sequence[str]]
"""Texts in request order. The requests are the same in all of them."""


def compare_outputs(outputs: Outputs, arms: Sequence[Arm], loads: Sequence[Load]) -> list[Fidelity]:
    """Each arm against the `reference_arm` in equal rounds, and against itself in others.

    What has no pair of runs is left out.
    """
    names = [arm.name for arm in arms]
    reference = reference_arm(names)
    found = []
    for load in loads:
        rounds = sorted({number for _, label, number in outputs if label == load.label})
        wanted = [(name, reference, [(number, number) for number in rounds]) for name in names if name != reference]
        wanted += [(name, name, list(combinations(rounds, 2))) for name in names]
        for arm, against, pairs in wanted:
            keys = [((arm, load.label, one), (against, load.label, other)) for one, other in pairs]
            both = [(outputs[one], outputs[other]) for one, other in keys if one in outputs and other in outputs]
            texts = [text for run in both for text in zip(*run, strict=True)]
            if texts:
                found.append(_fidelity(arm, against, load, texts))
    return found


def reference_arm(names: Sequence[str]) -> str:
    """Of arms, the one whose answers are right: that which never runs out of memory, else the stock engine."""
    return next((name for name in (LARGE_POOL, "stock") if name in names), names[0])


def common_prefix(one: str, other: str) -> float:
    """Characters that both texts begin with, over those of the longer one; two empty texts are the same."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return same / max(len(one), len(other)) if one or other else 1.0


def _fidelity(arm: str, against: str, load: Load, texts: Sequence[tuple[str, str]]) -> Fidelity:
    return Fidelity(
        arm=arm,
        against=against,
        load=load.label,
        equal=fmean(one == other for one, other in texts),
        common_prefix=fmean(common_prefix(one, other) for one, other in texts),
        pairs=len(texts),
    )
