"""Populations of requests whose blocks match exactly when their labels are equal."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

POSITIONS = 12
Sample = tuple[NDArray[np.int_], NDArray[np.bool_]]
"""Labels and presence of blocks, `[P, n]` each."""

Population = Callable[[int, np.random.Generator], Sample]


def own_labels(count: int) -> NDArray[np.int_]:
    return 1000 + np.arange(count)


def clusters(count: int, rng: np.random.Generator) -> Sample:
    """Ten kinds of request of unequal shares; requests of a kind are equal throughout."""
    share = np.arange(1, 11) / 55
    kind = rng.choice(10, count, p=share)
    return np.tile(kind, (POSITIONS, 1)), np.ones((POSITIONS, count), dtype=bool)


def near_prefix(count: int, rng: np.random.Generator) -> Sample:
    """Shared text of one of three templates, then own text; lengths differ."""
    template, shared = rng.integers(3, size=count), rng.binomial(POSITIONS, 0.7, count)
    length = np.minimum(POSITIONS, shared + rng.integers(1, 5, count))
    position = np.arange(POSITIONS)[:, None]
    return np.where(position < shared, template, own_labels(count)), position < length


def mixed(count: int, rng: np.random.Generator) -> Sample:
    """Six in ten requests are of one of five kinds, the others like no other."""
    kind = np.where(rng.random(count) < 0.6, rng.integers(5, size=count), own_labels(count))
    return np.tile(kind, (POSITIONS, 1)), np.ones((POSITIONS, count), dtype=bool)


def heavy_tailed(count: int, rng: np.random.Generator) -> Sample:
    """Three hundred kinds with shares like 1 / rank: new ones keep coming."""
    share = 1 / np.arange(1, 301)
    kind = rng.choice(300, count, p=share / share.sum())
    return np.tile(kind, (POSITIONS, 1)), np.ones((POSITIONS, count), dtype=bool)


POPULATIONS: dict[str, Population] = {
    "clusters": clusters,
    "near_prefix": near_prefix,
    "mixed": mixed,
    "heavy_tailed": heavy_tailed,
}


def matching(labels: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Pairs of equal labels, `[P, n, n]`."""
    return labels[:, :, None] == labels[:, None, :]


def true_ratio(sample: Sample) -> float:
    """Blocks over distinct labels, counted one position at a time."""
    labels, present = sample
    distinct = sum(len(np.unique(line[here])) for line, here in zip(labels, present, strict=True))
    return present.sum() / distinct
