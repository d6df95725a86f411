"""What may predict the ratio of a block that is not computed: each gives a score, and a block is reused up to a limit.

Adding one: a function of `Cases` here and a line in `PREDICTORS`. Infinite scores are never reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from jointkv.core.evidence import Evidence
from jointkv.evaluate.reuse.cases import Cases, Floats

NEVER = np.float32(np.inf)
NEAR = 1e-6
"""Errors below this are rounding; ratios are not divided by less."""


@dataclass(frozen=True)
class Predictor:
    """A score `[n, b]` of the blocks behind the entry block.

    Attributes:
        says: what it is, for people.
        witnesses, sources: how many it needs at least.
    """

    says: str
    score: Callable[[Cases], Floats]
    witnesses: int = 0
    sources: int = 1


def everything(cases: Cases) -> Floats:
    return np.zeros_like(cases.true)


def entry(cases: Cases) -> Floats:
    return np.broadcast_to(cases.entry[:, None], cases.true.shape)


def worst(cases: Cases) -> Floats:
    return cases.witness.max(1)


def worst_behind_a_near_entry(cases: Cases) -> Floats:
    return np.where(cases.entry[:, None] <= 1, worst(cases), NEVER)


def mean_and_spread(cases: Cases) -> Floats:
    return cases.witness.mean(1) + 2 * cases.witness.std(1)


def scaled(cases: Cases) -> Floats:
    by_entry = cases.witness / cases.witness_entry[:, :, None].clip(NEAR)
    return by_entry.max(1) * cases.entry[:, None]


def added(cases: Cases) -> Floats:
    return (cases.witness - cases.witness_entry[:, :, None]).max(1) + cases.entry[:, None]


def worst_and_scaled(cases: Cases) -> Floats:
    return np.sqrt(worst(cases) * scaled(cases))


def two_sources(cases: Cases) -> Floats:
    second = cases.other_near.argmin(1)
    return np.take_along_axis(cases.other, second[:, None, None], axis=1)[:, 0]


def all_sources_scaled(cases: Cases) -> Floats:
    return (cases.other / cases.other_entry[:, :, None].clip(NEAR)).max(1) * cases.entry[:, None]


def second_block(cases: Cases) -> Floats:
    """Knows the block behind the entry block too, which is then no longer reused."""
    by_second = cases.witness / cases.witness[:, :, :1].clip(NEAR)
    score = by_second.max(1) * cases.true[:, :1]
    score[:, 0] = NEVER
    return np.maximum(score, worst(cases))


def most_sensitive_block(cases: Cases) -> Floats:
    """Knows the block that witnesses changed most; it is taken as if everything before it were computed too."""
    at = worst(cases).argmax(1)[:, None]
    by_probe = cases.witness / np.take_along_axis(cases.witness, at[:, None], axis=2).clip(NEAR)
    score = np.maximum(by_probe.max(1) * np.take_along_axis(cases.true, at, axis=1), worst(cases))
    np.put_along_axis(score, at, NEVER, axis=1)
    return score


def near_without_echo(cases: Cases) -> Floats:
    return np.where(cases.echo & ~cases.own_echo == 0, entry(cases), NEVER)


def echoes_covered(cases: Cases) -> Floats:
    covered = cases.own_echo | np.bitwise_or.reduce(cases.witness_echo, axis=1)
    return np.where(cases.echo & ~covered == 0, worst(cases), NEVER)


def echoes_explain(cases: Cases) -> Floats:
    evidence = evidence_of(cases)
    pages = np.arange(cases.true.size)
    new = evidence.new(pages, cases.echo.ravel())
    expected = evidence.worst * (1 + 1 / np.maximum(evidence.count, 1))
    return np.where(new | (evidence.count < 1), NEVER, expected).reshape(cases.true.shape).astype(np.float32)


def evidence_of(cases: Cases) -> Evidence:
    """What pages have heard, the blocks of all situations in a row."""
    pages = np.arange(cases.true.size)
    evidence = Evidence(len(pages))
    evidence.start(pages, cases.own_echo.ravel())
    for number in range(cases.witness.shape[1]):
        evidence.add(pages, cases.witness[:, number].ravel(), cases.witness_echo[:, number].ravel())
    return evidence


def truth(cases: Cases) -> Floats:
    return cases.true


PREDICTORS: Mapping[str, Predictor] = MappingProxyType(
    {
        "everything": Predictor("nothing known: all blocks", everything),
        "entry": Predictor("ratio of the entry block", entry),
        "entry, no echo": Predictor("the same, blocks without echoes of what differs", near_without_echo),
        "witnesses": Predictor("worst witness", worst, 1),
        "witnesses, near entry": Predictor("the same, entry block within the bounds", worst_behind_a_near_entry, 1),
        "mean and spread": Predictor("mean of the witnesses and two standard deviations", mean_and_spread, 2),
        "scaled": Predictor("worst witness over its entry block, times this entry block", scaled, 1),
        "added": Predictor("worst difference of witness and its entry block, plus this entry block", added, 1),
        "witnesses and scaled": Predictor("geometric mean of both", worst_and_scaled, 1),
        "two sources": Predictor("the nearest two sources compared with each other", two_sources, 0, 2),
        "sources, scaled": Predictor("all sources and the nearest, scaled by entry", all_sources_scaled, 0, 2),
        "second block": Predictor("worst witness, and scaled by a second computed block", second_block, 1),
        "sensitive block": Predictor("worst witness, and scaled by the most sensitive block", most_sensitive_block, 1),
        "echoes covered": Predictor("worst witness, no echo that none of them saw", echoes_covered, 1),
        "echoes explain": Predictor("the same, misses with new echoes set aside, times 1 + 1/n", echoes_explain, 1),
        "truth": Predictor("the ratio itself: what cannot be beaten", truth),
    }
)
