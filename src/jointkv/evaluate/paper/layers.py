"""The paper's Corollary 1 by layer: ratio of a batch against predictions from key cosines of other requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jointkv.core.blocks import PagedKV
from jointkv.errors import BadInput
from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.holding.held import Prefilled
from jointkv.evaluate.paper.setup import Sample, Setup
from jointkv.evaluate.predict.block_pairs import lines_of
from jointkv.fusion.pairs import pair_statistics
from jointkv.policy import FusionPolicy
from jointkv.theory.exceedance import dispersion_test
from jointkv.theory.rarefaction import rarefaction
from jointkv.theory.rate import expected_ratio, match_probabilities, predict_poisson


@dataclass(frozen=True)
class LayerRow:
    """Ratio of one layer at one threshold, measured on one batch and predicted from another of the same size.

    Attributes:
        measured: blocks over distinct blocks after the paper's policy.
        match_probability: share of pairs of requests whose blocks match, mean over positions.
        poisson, poisson_low, poisson_high: online search, pairs independent (Corollary 1), 95% interval.
        tree: the same assumption for the tree of Algorithm 1.
        rarefaction, low, high: online search on the real pairs, 95% interval.
        dispersion: p value of the test that matches per block are Poisson; None without any match.
    """

    dataset: str
    layer: int
    threshold: float
    requests: int
    measured: float
    match_probability: float
    poisson: float
    poisson_low: float
    poisson_high: float
    tree: float
    rarefaction: float
    low: float
    high: float
    dispersion: float | None


def run_layers(setup: Setup, drawn: Sample) -> list[LayerRow]:
    """Every layer that the paper's policy fuses, at every threshold, on the first requests of `drawn`."""
    count = setup.settings.layers_requests
    whole = setup.prefilled(drawn)
    batch, other = (prefilled.take(whole, range(start, start + count)) for start in (0, count))
    cosines = _key_cosines(other, setup.settings.block_size)
    rows = []
    for threshold in setup.settings.thresholds:
        setup.report(f"{drawn.dataset}: layers at {threshold:g}")
        cache = setup.held(batch, FusionPolicy.preset("paper", key_threshold=threshold)).cache
        for index, table in enumerate(cache.tables):
            if cache.pool.groups.fused[index]:
                held = table.held()
                measured = len(held) / len(held.unique())
                predicted = _predictions(cosines[index] >= threshold, count)
                layer = cache.pool.full_layers[index]
                rows.append(LayerRow(drawn.dataset, layer, threshold, count, measured, **predicted))
    return rows


def _key_cosines(batch: Prefilled, block_size: int) -> list[NDArray[np.float32]]:
    """Cosines of the K blocks of all pairs of requests, `[positions, requests, requests]` per layer."""
    pages = lines_of(batch, block_size).pages
    only_keys = FusionPolicy(similarity="key", key_threshold=-1.0, max_relative_error=None, max_token_error=None)
    found = []
    for layer in range(sum(name.startswith("key.") for name in batch.state)):
        kv = PagedKV([batch.state[f"key.{layer}"]], [batch.state[f"value.{layer}"]])
        cosine = pair_statistics(kv, pages, only_keys.rule()).key_cosine
        assert cosine is not None
        found.append(cosine.numpy())
    return found


def _predictions(accepted: NDArray[np.bool_], requests: int) -> dict[str, Any]:
    # All requests of a sample have one length, so no block is missing.
    chance = match_probabilities(accepted)
    poisson = predict_poisson(accepted, None, requests)
    [online] = rarefaction(accepted, None, [requests])
    try:
        dispersion = dispersion_test(accepted).p_value
    except BadInput:
        dispersion = None
    return {
        "match_probability": float(chance.mean()),
        "poisson": poisson.ratio,
        "poisson_low": poisson.low,
        "poisson_high": poisson.high,
        "tree": expected_ratio(chance, requests, search="tree"),
        "rarefaction": online.ratio,
        "low": online.low,
        "high": online.high,
        "dispersion": dispersion,
    }
