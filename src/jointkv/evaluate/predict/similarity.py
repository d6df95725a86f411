"""How alike a model's KV blocks are, per layer: across requests, and within one request."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.core.blocks import PagedKV
from jointkv.errors import LayoutError
from jointkv.evaluate.holding.prefilled import Prefilled, join, prefill
from jointkv.evaluate.predict.block_pairs import lines_of
from jointkv.evaluate.traffic.base import Request
from jointkv.fusion.pairs import pair_statistics, position_chunks
from jointkv.policy import FusionPolicy

Side = Literal["key", "value"]
Relation = Literal["across", "within"]

SIDES: tuple[Side, ...] = ("key", "value")
RELATIONS: tuple[Relation, ...] = ("across", "within")
ERROR_BOUNDS = (0.1, 0.2)
"""Relative errors for which the share of pairs is counted."""

_QUANTILES = (0.5, 0.9, 0.99, 1.0)
# Only says which statistics are wanted, whatever their size.
_COSINE_AND_ERROR = FusionPolicy(key_threshold=-1.0, max_relative_error=ERROR_BOUNDS[-1]).rule()


@dataclass(frozen=True)
class Similarity:
    """Cosines of all compared pairs of blocks of one layer, and how many pairs could share one page.

    Attributes:
        layer: number of the layer in the model.
        side: K or V.
        relation: `"across"`: blocks of different requests at equal positions. `"within"`: of one request.
        pairs: pairs compared; with none, all numbers below are NaN.
        mean, p50, p90, p99, max: of the cosines.
        share_within: for each of `ERROR_BOUNDS`, the share of pairs in which one of the two blocks, as it
            stands, serves the other within that relative error.
    """

    layer: int
    side: Side
    relation: Relation
    pairs: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    share_within: tuple[float, ...]

    def as_row(self) -> dict[str, Any]:
        """The same as a flat dictionary, with one entry `share_within_<bound>` for each bound."""
        row = dict(vars(self))
        shares = row.pop("share_within")
        return {
            **row,
            **{f"share_within_{bound:g}": share for bound, share in zip(ERROR_BOUNDS, shares, strict=True)},
        }


def prefill_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], block_size: int, progress: Callable[[int], None]
) -> Prefilled:
    """Prefill every request (token ids) whole and on its own; `progress` is called with the number of requests done.

    Of layers with a sliding window nothing is kept. Raises `UnsupportedModel`.
    """
    batches = []
    for done, row in enumerate(rows, start=1):
        # A prefill leaves out the last token of a prompt, so one more stands behind it.
        batch = prefill(model, [Request((*row, row[-1]), (), "")], block_size=block_size)
        state = {name: tensor for name, tensor in batch.state.items() if not name.startswith("sliding.")}
        batches.append(dataclasses.replace(batch, state=state))
        progress(done)
    return join(batches)


def similarities(
    batch: Prefilled,
    chunk_tokens: int,
    relations: Sequence[Relation] = RELATIONS,
    *,
    layers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Similarity]:
    """Compare the full blocks of `batch`: per layer, relation and side one `Similarity`, in this order.

    Args:
        chunk_tokens: tokens per chunk. Within a request, blocks at equal places of its chunks are compared; all its
            blocks, if no request is longer than a chunk.
        relations: what to compare.
        layers: numbers of the layers of `batch` in the model; None for 0, 1, ...
        progress: called with the number of layers done, after each.

    Raises:
        LayoutError: layer numbers that do not fit `batch`.
    """
    numbers = range(batch.layers) if layers is None else layers
    if len(numbers) != batch.layers:
        raise LayoutError(f"{len(numbers)} layer numbers for {batch.layers} layers of pages")
    across = lines_of(batch).pages
    single = len(across) * batch.block_size <= chunk_tokens
    arrange = {"across": lambda: across, "within": lambda: across.T if single else lines_of(batch, chunk_tokens).pages}
    matrices = {relation: arrange[relation]() for relation in relations}
    found = []
    for index, number in enumerate(numbers):
        for relation, pages in matrices.items():
            for side in SIDES:
                found.append(_summary(number, side, relation, *_compare(batch.state[f"{side}.{index}"], pages)))
        if progress is not None:
            progress(index + 1)
    return found


def _compare(layer: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and relative error of the pairs on each line of `pages`: float32 `[pairs]`, on the CPU."""
    # `pair_statistics` joins the errors of K and V; one side in both places gives that side's own.
    side = PagedKV([layer], [layer])
    cosines, errors = [torch.zeros(0)], [torch.zeros(0)]
    if pages.shape[1] > 1:
        for part in position_chunks(*pages.shape):
            found = pair_statistics(side, pages[part], _COSINE_AND_ERROR)
            assert found.key_cosine is not None and found.error is not None
            chosen = (found.valid[:, :, None] & found.valid[:, None, :]).triu(1)
            # An error depends on which of the two serves the other; a fusion plan may choose.
            error = torch.minimum(found.error, found.error.transpose(1, 2)).sqrt()
            # Rounding puts equal blocks a little beyond 1.
            cosines.append(found.key_cosine[chosen].clamp(-1, 1).cpu())
            errors.append(error[chosen].cpu())
    return torch.cat(cosines), torch.cat(errors)


def _summary(layer: int, side: Side, relation: Relation, cosine: Tensor, error: Tensor) -> Similarity:
    if not len(cosine):
        nothing = (math.nan,) * len(ERROR_BOUNDS)
        return Similarity(layer, side, relation, 0, math.nan, math.nan, math.nan, math.nan, math.nan, nothing)
    # Not torch.quantile: it refuses more than 16 million numbers.
    p50, p90, p99, largest = (float(value) for value in np.quantile(cosine.numpy(), _QUANTILES))
    mean = float(cosine.double().mean())
    shares = tuple(float((error <= bound).double().mean()) for bound in ERROR_BOUNDS)
    return Similarity(layer, side, relation, len(cosine), mean, p50, p90, p99, largest, shares)
