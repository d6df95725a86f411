"""The work of attention over block tables, in the form that kernels take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jointkv.core.plan import BlockRef
from jointkv.errors import IntegrityError, LayoutError

Ints = npt.NDArray[np.integer]

Turn = Callable[[Tensor, Tensor], Tensor]
"""Turns queries `[n, heads, d]`, each by so many positions, int64 `[n]`, as the model's rotary embedding would."""

SEEN_BY_ALL = -(2**30)
"""Offset of a page that lies before every query of its sequence."""


class Items(NamedTuple):
    """Work that one thread does at a time, for every KV head: a run of pages and a run of queries that read them all.

    Attributes:
        page_from, page_to, query_from, query_to: ranges of `Pages` and of `Queries`.
        columns: entries of each of the pages.
        partial: row of the partial outputs for the first query.
        entry: index into `Entries` of the first page's first one.
    """

    page_from: Ints
    page_to: Ints
    query_from: Ints
    query_to: Ints
    columns: Ints
    partial: Ints
    entry: Ints


class Pages(NamedTuple):
    """Pages as they are read, those of one segment one after the other.

    Attributes:
        page: page number.
        first, held: the tokens that are read, `held` of them from `first` on.
        offset: position of the first of them minus that of its sequence's first query; `SEEN_BY_ALL` where all see it.
    """

    page: Ints
    first: Ints
    held: Ints
    offset: Ints


class Queries(NamedTuple):
    """Queries of every segment, one after the other.

    Attributes:
        row: which of the `n` queries, or from `n` on which of the turned ones.
        seen: its number among its sequence's queries.
        column_from, column_to: its entries among those of each page; several where a sequence reads a page repeatedly.
    """

    row: Ints
    seen: Ints
    column_from: Ints
    column_to: Ints


class Entries(NamedTuple):
    """What each page serves, page after page.

    Attributes:
        number: `row * slots + slot` of the block tables; looks up scales.
        page: index into `Pages`.
        shift: position shift.
    """

    number: Ints
    page: Ints
    shift: Ints


class Merge(NamedTuple):
    """Partial outputs `partial[start[i]:start[i + 1]]` make query `i`."""

    start: Ints
    partial: Ints


class NativeWork(ctypes.Structure):
    """`work_list` of paged.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in Items._fields),
        *((name, ctypes.c_void_p) for name in Pages._fields),
        *((name, ctypes.c_void_p) for name in Queries._fields),
        *((name, ctypes.c_void_p) for name in ("entries", "merge_start", "merge")),
        *((name, ctypes.c_int64) for name in ("num_items", "num_queries")),
    )


@dataclass(frozen=True)
class WorkList:
    """Everything that attention over some block tables has to do.

    It holds while the tables stand; `grow` follows sequences that decode into their last block. All arrays but the
    lengths and those of turned queries are int32.

    Attributes:
        shape: rows and slots of the block tables.
        block_size: tokens per page.
        heads_per_kv_head: query heads that share a KV head; items are cut for so many.
        lengths: tokens of each sequence, `[rows]`.
        query_lengths: queries of each sequence, its last tokens, `[rows]`; `n` in all.
        turned: which of the `n` queries are turned back, once for each shift but 0 at which they read. The turned ones
            follow the others in this order: that of shifts.
        turned_by: the shift of each.
        last_page: index into `pages` of each sequence's last block, `[rows]`.
        room: tokens that each sequence may have before its table must change, `[rows]`.
    """

    shape: tuple[int, int]
    block_size: int
    heads_per_kv_head: int
    lengths: Ints
    query_lengths: Ints
    items: Items
    pages: Pages
    queries: Queries
    entries: Entries
    merge: Merge
    turned: Ints
    turned_by: Ints
    last_page: Ints
    room: Ints

    @cached_property
    def num_queries(self) -> int:
        return int(self.query_lengths.sum())

    @cached_property
    def num_pages(self) -> int:
        """What a pool must have at the least."""
        return int(self.pages.page.max()) + 1

    @cached_property
    def native(self) -> NativeWork:
        """The arrays' addresses: they are changed in place only."""
        arrays = (*self.items, *self.pages, *self.queries, self.entries.number, *self.merge)
        return NativeWork(*(array.ctypes.data for array in arrays), len(self.items.page_from), self.num_queries)

    @cached_property
    def turning(self) -> tuple[Tensor, Tensor]:
        """Which of the `n` queries are turned, and by how many positions: int64 `[m]` each, on the host."""
        return torch.from_numpy(self.turned), torch.from_numpy(-self.turned_by)

    @cached_property
    def copies(self) -> dict[torch.device, Any]:
        """What kernels keep of the list on other devices."""
        return {}

    def grow(self, lengths: Tensor) -> None:
        """Let sequences that decode have `lengths [rows]` tokens; changes the list in place.

        Raises:
            LayoutError: a sequence has several queries or shrinks, or its last block is full: make a new list.
        """
        longer = lengths.numpy(force=True).astype(np.int64)
        if longer.shape != self.lengths.shape or (self.query_lengths != 1).any():
            raise LayoutError("only a list of one query a sequence can grow")
        if (longer < self.lengths).any() or (longer > self.room).any():
            raise LayoutError("a sequence has left its last block: the work list must be made again")
        by = (longer - self.lengths).astype(np.int32)
        self.pages.held[self.last_page] += by
        self.pages.offset[self.last_page] -= by
        self.lengths[:] = longer

    def with_turned(self, rows: Tensor, turn: Turn | None) -> Tensor:
        """Queries `rows [n, heads, d]`, float32, followed by those that `turned` asks for, turned back.

        Raises:
            LayoutError: `turn` changes the shape.
        """
        if not len(self.turned) or turn is None:
            return rows
        which, back = self.turning
        asked = rows[which.to(rows.device)]
        turned = turn(asked, back).float()
        if turned.shape != asked.shape:
            raise LayoutError(f"turning queries {list(asked.shape)} gave {list(turned.shape)}")
        return torch.cat((rows, turned))

    def references(self) -> Iterator[tuple[int, int, BlockRef]]:
        """Row, slot and what it reads, without scales, in any order."""
        for number, index, shift in zip(*(part.tolist() for part in self.entries), strict=True):
            page, first, held, _ = (int(part[index]) for part in self.pages)
            yield *divmod(number, self.shape[1]), BlockRef(page, shift=shift, first=first, count=held)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every token is read once for each query that sees it, and merged."""
        items, pages, queries = self.items, self.pages, self.queries
        read = np.zeros(self.num_queries + len(self.turned), np.int64)
        for i in range(len(items.page_from)):
            asked, run = slice(items.query_from[i], items.query_to[i]), slice(items.page_from[i], items.page_to[i])
            seen = queries.seen[asked, None] + 1 - pages.offset[None, run]
            tokens = np.clip(seen, 0, pages.held[None, run]).sum(1)
            np.add.at(read, queries.row[asked], tokens * (queries.column_to - queries.column_from)[asked])
        original = np.append(np.arange(self.num_queries), self.turned)
        found = np.bincount(original, read, self.num_queries)
        first = np.repeat(self.lengths - self.query_lengths, self.query_lengths)
        if (found != first + within(self.query_lengths) + 1).any():
            raise IntegrityError("the work list does not read every token once")
        if (np.sort(self.merge.partial) != np.arange(self.merge.start[-1])).any():
            raise IntegrityError("a partial output is not merged, or twice")


def within(sizes: Ints) -> Ints:
    """0 .. size - 1 for each of `sizes`, one after the other."""
    return np.arange(int(sizes.sum())) - np.repeat(sizes.cumsum() - sizes, sizes)
