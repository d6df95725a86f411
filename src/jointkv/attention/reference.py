"""Paged attention in plain torch: the definition that every kernel is compared with. Clear, not fast."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jointkv.attention.checks import Attention
from jointkv.attention.work import Turn
from jointkv.core.plan import BlockRef
from jointkv.errors import LayoutError


def attend(asked: Attention) -> tuple[Tensor, Tensor]:
    """The kernel for machines that have no other: `paged_attention` over the block references of a work list."""
    query, pages, work, scales, scale, turn = asked
    tables: list[dict[int, BlockRef]] = [{} for _ in work.lengths]
    for row, slot, ref in work.references():
        key, value = (float(table[row, slot]) for table in scales) if scales else (1.0, 1.0)
        tables[row][slot] = dataclasses.replace(ref, k_scale=key, v_scale=value)
    ordered = [[table[slot] for slot in sorted(table)] for table in tables]
    return paged_attention(query, work.query_lengths.tolist(), *pages.read(), ordered, scale=scale, turn=turn)


def paged_attention(
    query: Tensor,
    query_lengths: Sequence[int],
    keys: Tensor,
    values: Tensor,
    tables: Sequence[Sequence[BlockRef]],
    *,
    scale: float | None = None,
    turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a ragged batch over pages named by block references.

    Sequence `i` consists of the valid tokens of its references, in order; its queries are its last
    `query_lengths[i]` tokens (one in decode, more in chunked prefill). A reference's scales multiply the K and V it
    reads. A shift `s` means that the page's K was computed `s` positions earlier than it is used, so the query is
    turned back: `q . R(s) k = R(-s) q . k`.

    Args:
        query: `[sum(query_lengths), query heads, d]`.
        keys, values: one layer's pages, `[pages, t, h, d]` and `[pages, t, h, dv]`; query heads are a multiple of `h`.
        tables: per sequence its block references.
        scale: factor on the logits; `d ** -0.5` when None.
        turn: see `Turn`; needed when a shift is not 0.

    Returns:
        Output `[sum(query_lengths), query heads, dv]` in the query's dtype, and the log-sum-exp of the scaled logits,
        float32 `[sum(query_lengths), query heads]`. Computed in float32, or float64 for float64 queries.

    Raises:
        LayoutError: shapes that do not fit, a shift without `turn`, a range outside the page, or more queries than
            tokens.
    """
    _check(query, query_lengths, keys, values, tables)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs, sums = [], []
    for rows, table in zip(query.split(list(query_lengths)), tables, strict=True):
        output, log_sum = _one_sequence(rows, keys, values, table, scale, turn)
        outputs.append(output.to(query.dtype))
        sums.append(log_sum)
    return torch.cat(outputs), torch.cat(sums)


def _one_sequence(
    query: Tensor, keys: Tensor, values: Tensor, table: Sequence[BlockRef], scale: float, turn: Turn | None
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(query.dtype, torch.float32)
    query = query.to(compute)
    groups = query.shape[1] // keys.shape[2]
    logits, read = [], []
    for ref in table:
        tokens = slice(ref.first, ref.first + ref.count)
        key = (keys[ref.page, tokens].to(compute) * ref.k_scale).repeat_interleave(groups, 1)
        if ref.shift and turn is None:
            raise LayoutError("a block reference has a position shift and no rotary embedding was given")
        turned = turn(query, torch.full((len(query),), -ref.shift)) if ref.shift and turn is not None else query
        logits.append(torch.einsum("qhd,thd->hqt", turned, key) * scale)
        read.append((values[ref.page, tokens].to(compute) * ref.v_scale).repeat_interleave(groups, 1))
    scores, value = torch.cat(logits, -1), torch.cat(read)
    length, asked = value.shape[0], query.shape[0]
    if asked > length:
        raise LayoutError(f"{asked} queries for a sequence of {length} tokens")
    last_seen = torch.arange(length - asked, length, device=query.device)
    future = torch.arange(length, device=query.device) > last_seen[:, None]
    scores = scores.masked_fill(future, -math.inf)
    output = torch.einsum("hqt,thd->qhd", scores.softmax(-1), value)
    return output, scores.logsumexp(-1).T.float()


def _check(
    query: Tensor,
    query_lengths: Sequence[int],
    keys: Tensor,
    values: Tensor,
    tables: Sequence[Sequence[BlockRef]],
) -> None:
    if query.dim() != 3 or keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise LayoutError("query must be [n, heads, d] and pages [pages, t, h, d]")
    if query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[2]:
        raise LayoutError(f"queries {list(query.shape)} do not fit pages {list(keys.shape)}")
    if sum(query_lengths) != len(query) or len(query_lengths) != len(tables):
        raise LayoutError("query lengths, queries and tables differ in number")
    size = keys.shape[1]
    if any(not table for table in tables):
        raise LayoutError("a sequence without tokens has no attention")
    for ref in (ref for table in tables for ref in table):
        if not (ref.first >= 0 and ref.count > 0 and ref.first + ref.count <= size):
            raise LayoutError(f"tokens {ref.first}..{ref.first + ref.count} lie outside a page of {size}")
        if not 0 <= ref.page < len(keys):
            raise LayoutError(f"page {ref.page} does not exist")
