"""Rate-distortion curves of a real model: predicted from some requests, measured on others, whole and per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from jointkv.evaluate.holding.fused import FusedBatch
from jointkv.evaluate.holding.prefilled import Prefilled, prefill
from jointkv.evaluate.predict.block_pairs import errors_of, lines_of, pair_error_matrices
from jointkv.evaluate.progress import Progress
from jointkv.evaluate.traffic.base import Request
from jointkv.policy import FusionPolicy
from jointkv.theory.calibrate import TOKEN_SLACK
from jointkv.theory.curve import RateDistortionCurve, rate_distortion


def measured_curves(
    model: PreTrainedModel, requests: Sequence[Request], bounds: Sequence[float], block_size: int, progress: Progress
) -> list[RateDistortionCurve]:
    """The curve of all layers together (group None), then that of each layer alone; bounds as in `calibrate`.

    The first half of `requests` predicts; the second half, on pages of its own, is measured at every bound.
    """
    count = len(requests) // 2
    progress.start(f"prefill of {len(requests)} requests")
    known, fresh = (prefill(model, part, block_size=block_size) for part in (requests[count:], requests[:count]))
    lines = lines_of(known)
    progress.start("comparing blocks")
    groups = [range(known.layers), *([layer] for layer in range(known.layers))]
    errors = pair_error_matrices(known, lines, groups, progress=progress.part)
    found = [
        rate_distortion(error.numpy(), lines.valid.numpy(), bounds, requests=count, group=index - 1 if index else None)
        for index, error in enumerate(errors)
    ]
    progress.start("measuring the other half")
    measured = []
    for number, bound in enumerate(bounds):
        measured.append(_measured(model, fresh, bound, 1) + _measured(model, fresh, bound, "per_layer"))
        progress.part((number + 1) / len(bounds))
    return [
        curve.with_measured({bound: row[index] for bound, row in zip(bounds, measured, strict=True)})
        for index, curve in enumerate(found)
    ]


def _measured(
    model: PreTrainedModel, batch: Prefilled, bound: float, groups: int | Literal["per_layer"]
) -> list[tuple[float, float]]:
    """Ratio and distortion of every layer group of `batch` in a cache, over its full blocks."""
    policy = FusionPolicy.preset(
        "safe", max_relative_error=bound, max_token_error=TOKEN_SLACK * bound, layer_groups=groups
    )
    cache = FusedBatch(model, batch, policy).cache
    own = batch.table
    full = torch.arange(own.shape[1]) < batch.full_blocks[:, None]
    found = []
    for group, table in enumerate(cache.tables):
        # A page is a block that keeps its own place, as it was before fusion.
        keeps, served = full & ~table.served, full & table.served
        block_of = torch.zeros(int(table.pages.max()) + 1, dtype=torch.long)
        block_of[table.pages[keeps]] = own[keeps]
        layers = range(group * cache.pool.groups.layers, (group + 1) * cache.pool.groups.layers)
        errors = errors_of(batch, layers, own[served], block_of[table.pages[served]])
        pages = len(table.pages[full].unique())
        found.append((int(full.sum()) / pages, float(errors.double().square().sum()) / int(full.sum())))
    return found
