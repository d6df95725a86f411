"""How alike a model's KV blocks are, per layer: across requests, and within one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jointkv.blocks import PagedKV
from jointkv.errors import LayoutError
from jointkv.fusion.pairs import pair_statistics, position_chunks
from jointkv.policy import FusionPolicy

Side = Literal["key", "value"]
Relation = Literal["across", "within"]

SIDES: tuple[Side, ...] = ("key", "value")
RELATIONS: tuple[Relation, ...] = ("across", "within")
ERROR_BOUNDS = (0.1, 0.2)
"""Relative errors for which the share of pairs is counted."""

_QUANTILES = (0.5, 0.9, 0.99, 1.0)
# Only says which statistics are wanted: cosines and relative errors of K and V, whatever their size.
_EVERYTHING = FusionPolicy(key_threshold=-1.0, value_threshold=-1.0)


@dataclass(frozen=True)
class Similarity:
    """Cosines of all compared pairs of blocks of one layer, and how many pairs could share one page.

    Attributes:
        layer: number of the layer in the model.
        side: K or V.
        relation: `"across"`: blocks of different requests at equal positions. `"within"`: blocks of one request.
        pairs: pairs compared; with none, all numbers below are NaN.
        mean, p50, p90, p99, max: of the cosines.
        share_within: for each of `ERROR_BOUNDS`, the share of pairs in which one of the two blocks, as it stands,
            serves the other within that relative error.
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
        return {**row, **{f"share_within_{bound:g}": share for bound, share in zip(ERROR_BOUNDS, shares)}}


def similarities(
    kv: PagedKV,
    tables: Sequence[Tensor],
    chunk_blocks: int,
    relations: Sequence[Relation] = RELATIONS,
    *,
    layers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Similarity]:
    """Compare the blocks of some requests layer by layer; changes nothing.

    Args:
        kv: the pages of all layers to compare.
        tables: per request the pages of its full blocks, long `[blocks]`; lengths may differ.
        chunk_blocks: blocks per chunk, see `within_request`.
        relations: what to compare.
        layers: numbers of the layers of `kv` in the model; None for 0, 1, ...
        progress: called with the number of layers done, after each.

    Returns:
        Per layer, relation and side one `Similarity`, in this order.

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
        layer = PagedKV([kv.keys[index]], [kv.values[index]])
        for relation, pages in matrices.items():
            for side, (cosine, error) in zip(SIDES, _compare(layer, pages), strict=True):
                found.append(_summary(number, side, relation, cosine, error))
        if progress is not None:
            progress(index + 1)
    return found


def across_requests(tables: Sequence[Tensor]) -> Tensor:
    """Pages of equal positions, one line per position and one column per request: `[P, N]`, -1 for none."""
    return torch.nn.utils.rnn.pad_sequence([table.cpu() for table in tables], padding_value=-1)


def within_request(tables: Sequence[Tensor], chunk_blocks: int) -> Tensor:
    """Pages of one request on each line, `[P, N]`, -1 for none.

    A line holds equal places of the chunks of `chunk_blocks` blocks of a request (the last may be shorter). If no
    request is longer than a chunk, it holds all blocks of a request.
    """
    rows = across_requests(tables).T
    chunks = -(-rows.shape[1] // chunk_blocks)
    if chunks <= 1:
        return rows
    padded = torch.nn.functional.pad(rows, (0, chunks * chunk_blocks - rows.shape[1]), value=-1)
    return padded.view(len(rows), chunks, chunk_blocks).transpose(1, 2).flatten(0, 1)


def as_pages(
    keys: Sequence[Tensor], values: Sequence[Tensor], block_size: int
) -> tuple[PagedKV, list[Tensor]]:
    """Dense K and V of a batch without padding as pages, and the table of each request; copies.

    Args:
        keys, values: per layer `[B, h, S, d]`, as in a `DynamicCache`; a last block that is not full is left out.

    Raises:
        LayoutError: not four dimensions, fewer tokens than a block, or layers that differ in shape.
    """
    paged: list[list[Tensor]] = []
    for layers in (keys, values):
        for states in layers:
            if states.dim() != 4 or states.shape[2] < block_size:
                raise LayoutError(
                    f"[B, h, S, d] with S of at least {block_size} expected, got {list(states.shape)}"
                )
        paged.append([_cut(states, block_size) for states in layers])
    kv = PagedKV(*paged)
    requests = keys[0].shape[0]
    return kv, list(torch.arange(kv.num_pages).view(requests, -1))


def _cut(states: Tensor, block_size: int) -> Tensor:
    rows, heads, tokens, size = states.shape
    full = tokens // block_size * block_size
    return states[:, :, :full].transpose(1, 2).reshape(-1, block_size, heads, size)


def _compare(layer: PagedKV, pages: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cosine and relative error of each pair on a line of `pages`, for K and for V: float32 `[pairs]` each."""
    parts: list[list[Tensor]] = [[], [], [], []]
    if pages.shape[1] > 1:
        for part in position_chunks(layer, *pages.shape):
            found = pair_statistics(layer, pages[part], _EVERYTHING, 0)
            chosen = (found.valid[:, :, None] & found.valid[:, None, :]).triu(1)
            matrices = (found.key_cosine, found.key_error, found.value_cosine, found.value_error)
            for number, matrix in enumerate(matrices):
                assert matrix is not None
                # An error depends on which of the two serves the other; a fusion plan may choose.
                best = torch.minimum(matrix, matrix.transpose(1, 2)).sqrt() if number % 2 else matrix
                parts[number].append(best[chosen].cpu())
    joined = [torch.cat(part) if part else torch.zeros(0) for part in parts]
    return (joined[0], joined[1]), (joined[2], joined[3])


def _summary(layer: int, side: Side, relation: Relation, cosine: Tensor, error: Tensor) -> Similarity:
    if not len(cosine):
        unknown = math.nan
        return Similarity(
            layer,
            side,
            relation,
            0,
            unknown,
            unknown,
            unknown,
            unknown,
            unknown,
            (unknown,) * len(ERROR_BOUNDS),
        )
    # Not torch.quantile: it refuses more than 16 million numbers.
    quantiles = (float(value) for value in np.quantile(cosine.numpy(), _QUANTILES))
    shares = tuple(float((error <= bound).double().mean()) for bound in ERROR_BOUNDS)
    return Similarity(layer, side, relation, len(cosine), float(cosine.double().mean()), *quantiles, shares)
