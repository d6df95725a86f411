"""Paged attention on a GPU by Triton kernels that read a page once for all sequences that share it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jointkv.attention.checks import Attention, check_scale
from jointkv.attention.grouping import ITEMS_PER_THREAD
from jointkv.attention.layouts import LayerPages
from jointkv.attention.work import Items, Turn, WorkList, within
from jointkv.errors import LayoutError, NativeUnavailable
from jointkv.system import native

MOST_SIZE = 256
"""Head size; larger ones do not fit the memory of a multiprocessor."""

MOST_ROWS, MOST_TOKENS = 64, 64
"""Of a tile. With more rows, a sequence that decodes in a batch with prefill would wait for multiplication."""

TILE_BYTES = 2**16
"""Of the K and V that are on their way, so that several programs fit a multiprocessor."""

PROGRAMS_PER_PROCESSOR = 8


class Store(NamedTuple):
    """Pages, with strides in numbers."""

    key: Tensor
    value: Tensor
    key_page: int
    key_token: int
    key_head: int
    value_page: int
    value_token: int
    value_head: int


class Scales(NamedTuple):
    """Of K and of V, by entry of the work list."""

    key: Tensor
    value: Tensor


class Partial(NamedTuple):
    """Outputs `[parts, query heads, dv]`, their maxima and sums `[parts, query heads]`."""

    output: Tensor
    most: Tensor
    total: Tensor


def threads(device: torch.device, num_heads: int) -> int:
    """What `group_pages` needs as `threads` so that layers of `num_heads` KV heads keep a GPU busy."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-processors * PROGRAMS_PER_PROCESSOR // (ITEMS_PER_THREAD * num_heads))


def attend(asked: Attention) -> tuple[Tensor, Tensor]:
    """See `paged.paged_attention`."""
    query, pages, work, tables, scale, turn = asked
    kernels = _kernels()
    _check(query, pages, kernels.INTERPRETED.value)
    lists = _Lists.of(work, pages.device)
    scales = None if tables is None else Scales(*(lists.scale(table, work) for table in tables))
    rows, rest = _rows(query, work, turn)
    heads, size = query.shape[1], pages.value_size
    output = query.new_empty(len(query), heads, size)
    log_sum = query.new_empty(len(query), heads, dtype=torch.float32)
    partial = Partial(output, log_sum, log_sum)
    if not lists.whole:
        shape = (len(work.merge.partial), heads)
        partial = Partial(*(log_sum.new_empty(*shape, *more) for more in ((size,), (), ())))
    with torch.cuda.device_of(query):
        kernels.attend[(len(lists.items.page_from) * pages.num_heads,)](
            *(rows, rest, _store(pages), scales, lists.items, lists.pages, lists.queries, partial),
            *(scale * math.log2(math.e), lists.most_repeats, pages.num_heads, work.heads_per_kv_head),
            *(pages.block_size, pages.key_size, size),
            rows=lists.rows,
            causal=lists.causal,
            whole=lists.whole,
            **_tiling(pages, lists.rows),
        )
        if not lists.whole:
            kernels.merge[(len(query) * heads,)](partial, lists.merge, output, log_sum, heads, size)
    return output, log_sum


def _check(query: Tensor, pages: LayerPages, interpreted: bool) -> None:
    if pages.order != "rows" or not (pages.device.type == "cuda" or interpreted):
        raise LayoutError(f"pages by {pages.order} on {pages.device} are not supported")
    if pages.keys.stride(3) != 1 or pages.values.stride(3) != 1:
        raise LayoutError(f"pages with strides {pages.keys.stride()} and {pages.values.stride()} were never seen")
    for size in (pages.key_size, pages.value_size):
        if size > MOST_SIZE:
            raise LayoutError(f"head size {size} is not supported: multiples of 16 up to {MOST_SIZE}")
    if query.dtype != pages.dtype:
        raise LayoutError(f"queries of {query.dtype} for pages of {pages.dtype}")


def _rows(query: Tensor, work: WorkList, turn: Turn | None) -> tuple[Tensor, Tensor | None]:
    """Queries and turned ones, and what rounding took from them: rounding a query once more would cost precision."""
    if not len(work.turned):
        return query.contiguous(), None
    exact = work.with_turned(query.float(), turn)
    rounded = exact.to(query.dtype)
    return rounded, (exact - rounded).to(query.dtype)


def _store(pages: LayerPages) -> Store:
    strides = (part.stride(axis) for part in (pages.keys, pages.values) for axis in (0, 1, 2))
    return Store(pages.keys, pages.values, *strides)


def _tiling(pages: LayerPages, rows: int) -> dict[str, int]:
    """Tokens of a tile, how many tiles are on their way, and warps, so that the compiler keeps a tile in registers."""
    size = 2 ** math.ceil(math.log2(max(pages.key_size, pages.value_size)))
    line = 2 * size * pages.dtype.itemsize
    tokens = min(MOST_TOKENS, TILE_BYTES // 2 // line)
    stages = min(3, TILE_BYTES // (tokens * line))
    return {"tokens": tokens, "num_stages": stages, "num_warps": 8 if rows * size >= 2**13 else 4}


class _Lists:
    """A work list on a device, its items cut to tiles. Follows the list as it grows."""

    def __init__(self, work: WorkList, device: torch.device) -> None:
        group = work.heads_per_kv_head
        items = _cut(work.items, max(1, MOST_ROWS // group))
        most = int((items.query_to - items.query_from).max()) * group
        self.rows = max(16, 2 ** math.ceil(math.log2(most)))
        self.most_repeats = int((work.queries.column_to - work.queries.column_from).max())
        self.causal = bool((work.query_lengths > 1).any())
        self.whole = not len(work.turned) and len(work.merge.partial) == work.num_queries
        self.device, self.tokens = device, int(work.lengths.sum())
        self.items, self.pages, self.queries, self.merge = (
            _moved(part, device) for part in (items, work.pages, work.queries, work.merge)
        )
        self.number = torch.from_numpy(work.entries.number).to(device)
        self.known: dict[int, tuple[Tensor, int, Tensor]] = {}

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> _Lists:
        """Kept with the work list."""
        if device not in work.copies:
            work.copies[device] = cls(work, device)
        lists = work.copies[device]
        tokens = int(work.lengths.sum())
        if lists.tokens != tokens:
            lists.pages, lists.tokens = _moved(work.pages, device), tokens
        return lists

    def scale(self, table: Tensor, work: WorkList) -> Tensor:
        """By entry. A table on the device is checked once for each of its versions, since checking waits for it."""
        kept, version, scales = self.known.get(id(table), (None, 0, table))
        known = table.device == self.device and not table.is_inference()
        if kept is not table or not known or version != table._version:
            check_scale(table, work)
            scales = table.to(self.device, torch.float32).flatten()[self.number]
            if known:
                self.known[id(table)] = (table, table._version, scales)
        return scales


def _moved(arrays: Any, device: torch.device) -> Any:
    return type(arrays)(*(torch.from_numpy(array).to(device, copy=True) for array in arrays))


def _cut(items: Items, most: int) -> Items:
    """The same work in items of `most` queries: those that continue one another are joined before they are cut."""
    continued = (items.page_from[1:] == items.page_from[:-1]) & (items.query_from[1:] == items.query_to[:-1])
    first = np.append(True, ~continued).nonzero()[0]
    asked = items.query_to[np.append(first[1:], len(items.page_from)) - 1] - items.query_from[first]
    blocks = -(-asked // most)
    of, block = np.repeat(first, blocks), within(blocks)
    begin, end = (np.repeat(asked, blocks) * (block + i) // np.repeat(blocks, blocks) for i in (0, 1))
    cut = Items(*(part[of] for part in items))
    cut = cut._replace(query_from=cut.query_from + begin, query_to=cut.query_from + end, partial=cut.partial + begin)
    return Items(*(part.astype(np.int32) for part in cut))


def _kernels() -> ModuleType:
    kernels = native.triton_kernels("jointkv.attention.paged_triton")
    if kernels is None:
        raise NativeUnavailable("attention on a GPU needs Triton: install jointkv[gpu]")
    return kernels
