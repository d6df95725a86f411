"""What every kernel makes sure of before it starts, so that no kernel gives a wrong number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jointkv.attention.layouts import PAGE_DTYPES, LayerPages
from jointkv.attention.work import Turn, WorkList
from jointkv.errors import LayoutError


class Attention(NamedTuple):
    """What a kernel is asked for; see `paged.paged_attention`. `scales` are on K and on V, if there are any."""

    query: Tensor
    pages: LayerPages
    work: WorkList
    scales: tuple[Tensor, Tensor] | None
    scale: float
    turn: Turn | None


def check(asked: Attention) -> None:
    """Raise `LayoutError` unless queries, pages and work list fit together."""
    query, pages, work = asked.query, asked.pages, asked.work
    if query.dim() != 3 or query.dtype not in PAGE_DTYPES:
        raise LayoutError(f"queries must be [n, heads, d] of a known dtype, got {query.dtype} {list(query.shape)}")
    if query.device != pages.device:
        raise LayoutError(f"queries on {query.device} for pages on {pages.device}")
    if query.shape[0] != work.num_queries or query.shape[2] != pages.key_size:
        raise LayoutError(f"queries {list(query.shape)}: {work.num_queries} of size {pages.key_size} are asked for")
    if query.shape[1] != pages.num_heads * work.heads_per_kv_head:
        raise LayoutError(
            f"{query.shape[1]} query heads for {pages.num_heads} KV heads, "
            f"the work list was made for {work.heads_per_kv_head} each"
        )
    if work.block_size != pages.block_size or work.num_pages > pages.num_pages:
        raise LayoutError(
            f"the tables name {work.num_pages} pages of {work.block_size} tokens, "
            f"there are {pages.num_pages} of {pages.block_size}"
        )
    if len(work.turned) and asked.turn is None:
        raise LayoutError("a block reference has a position shift and no rotary embedding was given")
    if pages.device.type == "cpu":  # elsewhere a kernel does it, once for each table, because looking at one waits
        for table in asked.scales or ():
            check_scale(table, work)


def check_scale(table: Tensor, work: WorkList) -> None:
    """Raise `LayoutError` unless `table` has a positive finite scale for each slot of the block tables."""
    if table.shape != work.shape or not table.is_floating_point():
        raise LayoutError(f"scales must be {list(work.shape)}, got {table.dtype} {list(table.shape)}")
    least, most = torch.aminmax(table)
    if not (least > 0 and most < torch.inf):
        raise LayoutError("scales must be positive and finite")
