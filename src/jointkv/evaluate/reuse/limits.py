"""From scores to shares: which limit keeps the missed blocks rare, and what it lets skip on texts not chosen on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.evaluate.reuse.cases import Cases, Floats

NOTHING = -np.inf
"""The limit that reuses nothing."""


@dataclass(frozen=True)
class Scored:
    """Scores of a predictor, and what is true, `[n, b]` each; `fold` says which texts are left out together."""

    kind: str
    fold: int
    score: Floats
    missed: NDArray[np.bool_]
    share: float

    @classmethod
    def of(cls, cases: Cases, fold: int, score: Floats) -> Scored:
        return cls(cases.kind, fold, score, cases.missed, cases.share)


@dataclass(frozen=True)
class Count:
    """Blocks: all, reused, and missed among these; `share` of the tokens are in all of them."""

    blocks: int
    reused: int
    missed: int
    share: float

    @property
    def skipped(self) -> float:
        """Share of all prompt tokens."""
        return self.share * self.reused / self.blocks if self.blocks else 0.0

    @property
    def missed_share(self) -> float | None:
        """Of the reused blocks; None where there are none."""
        return self.missed / self.reused if self.reused else None


def largest_limit(scored: Sequence[Scored], rate: float) -> float:
    """The largest limit up to which at most `rate` of the reused blocks are missed, `NOTHING` if there is none."""
    if not scored:
        return NOTHING
    score = np.concatenate([each.score.ravel() for each in scored])
    missed = np.concatenate([each.missed.ravel() for each in scored])
    order = np.argsort(score, kind="stable")
    score, misses = score[order], np.cumsum(missed[order])
    # Equal scores are reused together.
    last = np.append(score[1:] != score[:-1], True)
    kept = np.flatnonzero(last & np.isfinite(score) & (misses <= rate * np.arange(1, len(score) + 1)))
    return float(score[kept[-1]]) if len(kept) else NOTHING


def count(scored: Iterable[Scored], limit: float) -> Count:
    """What is reused up to `limit`."""
    found = [(each.score.size, each.score <= limit, each) for each in scored]
    return Count(
        blocks=sum(size for size, _, _ in found),
        reused=sum(int(used.sum()) for _, used, _ in found),
        missed=sum(int((used & each.missed).sum()) for _, used, each in found),
        share=found[0][2].share if found else 0.0,
    )


def add(counts: Iterable[Count]) -> Count:
    """All of `counts`, of equal `share`."""
    rows = list(counts)
    return Count(
        blocks=sum(row.blocks for row in rows),
        reused=sum(row.reused for row in rows),
        missed=sum(row.missed for row in rows),
        share=rows[0].share if rows else 0.0,
    )


def held_out(scored: Sequence[Scored], rate: float, kind: str | None = None) -> dict[str, Count]:
    """By kind, what is reused of each fold under the limit that the other folds give.

    Args:
        kind: choose and measure on this kind alone.
    """
    chosen = [each for each in scored if kind in (None, each.kind)]
    found: dict[str, list[Count]] = {}
    for fold in sorted({each.fold for each in chosen}):
        limit = largest_limit([each for each in chosen if each.fold != fold], rate)
        for each in chosen:
            if each.fold == fold:
                found.setdefault(each.kind, []).append(count([each], limit))
    return {name: add(counts) for name, counts in found.items()}


def quantile_limits(scored: Sequence[Scored], points: int) -> list[float]:
    """At most `points` limits that cut the finite scores into equal parts."""
    score = np.concatenate([each.score.ravel() for each in scored])
    score = score[np.isfinite(score)]
    if not len(score):
        return []
    return np.unique(np.quantile(score, np.linspace(0, 1, points + 1)[1:], method="higher")).tolist()
