"""How alike a model's KV blocks are, per layer: across requests, and within one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.errors import LayoutError
from jointkv.fusion.pairs import pair_statistics, position_chunks
from jointkv.policy import FusionPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
class Prefilled:
    """K and V of some requests.

    Attributes:
        kv: the pages of all full-attention layers.
        tables: per request the pages of its full blocks, long `[blocks]`.
        layers: numbers of these layers in the model.
    """

    kv: PagedKV
    tables: list[Tensor]
    layers: list[int]


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


def prefill(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    block_size: int,
    progress: Callable[[int], None] | None = None,
) -> Prefilled:
    """Prefill every request (token ids) on its own, on the pages of one unfused pool.

    `progress` is called with the number of requests done. Raises `UnsupportedModel`.
    """
    from jointkv.hf.cache import JointCache
    from jointkv.hf.pool import JointPool

    pool = JointPool(model, "off", block_size=block_size)
    caches = []
    for done, row in enumerate(rows, start=1):
        caches.append(JointCache(pool))
        ids = torch.tensor([list(row)], device=model.device)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=caches[-1], use_cache=True, logits_to_keep=1)
        if progress is not None:
            progress(done)
    assert pool.blocks is not None
    tables = [cache.tables[0].pages[0, : len(row) // block_size] for cache, row in zip(caches, rows, strict=True)]
    # The pages stay readable after the caches are gone: nothing else allocates from this pool.
    return Prefilled(pool.blocks.kv, tables, pool.full_layers)


def similarities(
    kv: PagedKV,
    tables: Sequence[Tensor],
    chunk_blocks: int,
    relations: Sequence[Relation] = RELATIONS,
    *,
    layers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Similarity]:
    """Compare the blocks of some requests: per layer, relation and side one `Similarity`, in this order.

    Args:
        kv: the pages of all layers to compare.
        tables: per request the pages of its full blocks, long `[blocks]`; lengths may differ.
        chunk_blocks: blocks per chunk, see `within_request`.
        relations: what to compare.
        layers: numbers of the layers of `kv` in the model; None for 0, 1, ...
        progress: called with the number of layers done, after each.

    Raises:
        LayoutError: no request, or layer numbers that do not fit `kv`.
    """
    numbers = range(kv.num_layers) if layers is None else layers
    if not tables:
        raise LayoutError("similarity of no request")
    if len(numbers) != kv.num_layers:
        raise LayoutError(f"{len(numbers)} layer numbers for {kv.num_layers} layers of pages")
    arrange = {
        "across": lambda: across_requests(tables),
        "within": lambda: within_request(tables, chunk_blocks),
    }
    matrices = {relation: arrange[relation]() for relation in relations}
    found = []
    for index, number in enumerate(numbers):
        for relation, pages in matrices.items():
            for side, layer in zip(SIDES, (kv.keys[index], kv.values[index]), strict=True):
                found.append(_summary(number, side, relation, *_compare(layer, pages)))
        if progress is not None:
            progress(index + 1)
    return found


def across_requests(tables: Sequence[Tensor]) -> Tensor:
    """Pages of equal positions, one line per position and one column per request: `[P, N]`, -1 for none."""
    return torch.nn.utils.rnn.pad_sequence([table.cpu() for table in tables], padding_value=-1)


def within_request(tables: Sequence[Tensor], chunk_blocks: int) -> Tensor:
    """Pages of one request on each line, `[P, N]`, -1 for none.

    A line holds equal places of the chunks of `chunk_blocks` blocks of a request (the last may be shorter).
    If no request is longer than a chunk, it holds all blocks of a request.
    """
    rows = across_requests(tables).T
    chunks = -(-rows.shape[1] // chunk_blocks)
    if chunks <= 1:
        return rows
    padded = torch.nn.functional.pad(rows, (0, chunks * chunk_blocks - rows.shape[1]), value=-1)
    return padded.view(len(rows), chunks, chunk_blocks).transpose(1, 2).flatten(0, 1)


def as_pages(keys: Sequence[Tensor], values: Sequence[Tensor], block_size: int) -> tuple[PagedKV, list[Tensor]]:
    """Dense K and V of a batch without padding as pages, and the table of each request; copies.

    Args:
        keys, values: per layer `[B, h, S, d]`, as in a `DynamicCache`; a block that is not full is left out.

    Raises:
        LayoutError: not four dimensions, fewer tokens than a block, or layers that differ in shape.
    """
    paged: list[list[Tensor]] = []
    for layers in (keys, values):
        for states in layers:
            if states.dim() != 4 or states.shape[2] < block_size:
                raise LayoutError(f"[B, h, S, d] with S of at least {block_size} expected, got {list(states.shape)}")
        paged.append([_cut(states, block_size) for states in layers])
    kv = PagedKV(*paged)
    requests = keys[0].shape[0]
    return kv, list(torch.arange(kv.num_pages).view(requests, -1))


def _cut(states: Tensor, block_size: int) -> Tensor:
    _, heads, tokens, size = states.shape
    full = tokens // block_size * block_size
    return states[:, :, :full].transpose(1, 2).reshape(-1, block_size, heads, size)


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
