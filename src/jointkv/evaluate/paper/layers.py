"""The paper's Corollary 1 by layer: ratio of a batch against predictions from key cosines of other requests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jointkv.core.blocks import PagedKV
from jointkv.errors import BadInput
from jointkv.evaluate.holding.prefilled import Prefilled, take
from jointkv.evaluate.paper.result import LayerRow
from jointkv.evaluate.paper.setup import Sample, Setup
from jointkv.evaluate.predict.block_pairs import lines_of
from jointkv.fusion.pairs import pair_statistics
from jointkv.policy import FusionPolicy
from jointkv.theory.dispersion import dispersion_test
from jointkv.theory.rarefaction import rarefaction
from jointkv.theory.rate import match_probabilities, predict_poisson, tree_distinct


def run_layers(setup: Setup, drawn: Sample) -> list[LayerRow]:
    """Every layer that the paper's policy fuses, at every threshold, on the first requests of `drawn`."""
    count = setup.settings.layers_requests
    whole = setup.prefilled(drawn)
    batch, other = (take(whole, range(start, start + count)) for start in (0, count))
    cosines = _key_cosines(other)
    rows = []
    for threshold in setup.settings.thresholds:
        setup.report(f"{drawn.dataset}: layers at {threshold:g}")
        cache = setup.held(batch, FusionPolicy.preset("paper", key_threshold=threshold)).cache
        for index, table in enumerate(cache.tables):
            if cache.pool.groups.fused[index]:
                held = table.held()
                rows.append(
                    LayerRow(
                        dataset=drawn.dataset,
                        layer=cache.pool.full_layers[index],
                        threshold=threshold,
                        requests=count,
                        measured=len(held) / len(held.unique()),
                        **_predictions(cosines[index] >= threshold, count),
                    )
                )
    return rows


def _key_cosines(batch: Prefilled) -> list[NDArray[np.float32]]:
    """Cosines of the K blocks of all pairs of requests, `[positions, requests, requests]` per layer."""
    pages = lines_of(batch).pages
    only_keys = FusionPolicy(similarity="key", key_threshold=-1.0, max_relative_error=None, max_token_error=None)
    found = []
    for layer in range(batch.layers):
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
        "tree": float(requests * len(chance) / tree_distinct(chance, requests).sum()),
        "rarefaction": online.ratio,
        "low": online.low,
        "high": online.high,
        "dispersion": dispersion,
    }
