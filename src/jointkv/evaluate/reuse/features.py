"""Which features tell missed blocks from kept ones, among those that clean witnesses would let reuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jointkv.evaluate.reuse.cases import Cases
from jointkv.evaluate.reuse.predictors import worst
from jointkv.evaluate.reuse.result import ALL, FeatureRow

CLEAN = 1.0

Classes = Mapping[str, NDArray[np.bool_]]


def feature_rows(cases: Sequence[Cases], block_size: int) -> Iterator[FeatureRow]:
    """One row per kind, feature and value, then of all kinds together."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for case in cases:
        clean = worst(case) <= CLEAN
        for feature, classes in features(case).items():
            for value, chosen in classes.items():
                used = clean & chosen
                for kind in (case.kind, ALL):
                    blocks, missed = found.get((kind, feature, value), (0, 0))
                    key = (kind, feature, value)
                    found[key] = (blocks + int(used.sum()), missed + int((used & case.missed).sum()))
    for (kind, feature, value), (blocks, missed) in sorted(found.items()):
        yield FeatureRow(
            block_size=block_size,
            kind=kind,
            feature=feature,
            value=value,
            blocks=blocks,
            missed=missed / blocks if blocks else None,
        )


def features(case: Cases) -> Mapping[str, Classes]:
    """By feature, the blocks `[n, b]` of each value."""
    shape = case.true.shape
    place = np.broadcast_to(np.arange(shape[1]) / shape[1], shape)
    entry = np.broadcast_to(case.entry[:, None], shape)
    farther = entry > case.witness_entry.max(1)[:, None]
    covered = case.own_echo | np.bitwise_or.reduce(case.witness_echo, axis=1)
    own = case.echo & ~case.own_echo != 0
    new = case.echo & ~covered != 0
    near_limit = worst(case)
    return {
        "position in the run": {"first quarter": place < 0.25, "rest": place >= 0.25},
        "entry block": {"up to 0.5": entry <= 0.5, "up to 1": (entry > 0.5) & (entry <= 1), "beyond": entry > 1},
        "entry block against witnesses'": {"nearer than one": ~farther, "farther than all": farther},
        "worst witness": {
            "up to 0.5": near_limit <= 0.5,
            "up to 0.7": (near_limit > 0.5) & (near_limit <= 0.7),
            "up to 1": near_limit > 0.7,
        },
        "echoes of the header": {
            "none but the source's": ~own,
            "covered by a witness": own & ~new,
            "new": new,
        },
    }
