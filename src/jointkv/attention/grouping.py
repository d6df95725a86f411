"""What reads what: block tables turned into runs of pages that the same sequences read, for kernels to read once."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from jointkv.attention.work import SEEN_BY_ALL, Entries, Ints, Items, Merge, Pages, Queries, WorkList, within
from jointkv.errors import IntegrityError, LayoutError

MOST_ROWS = 48
"""Query heads that a kernel takes at a time, as in paged.c."""

PAGE_COST = 8
"""What reading a page costs, in query heads that are multiplied with it; decides only where work is split."""

ITEMS_PER_THREAD = 4
FEWEST_PAGES = 4
"""A run of pages is not split into shorter ones."""

Arrays = TypeVar("Arrays", Items, Pages, Queries, Entries, Merge)


def group_pages(
    tables: Tensor,
    lengths: Tensor,
    block_size: int,
    *,
    query_lengths: Tensor | None = None,
    first: Tensor | None = None,
    count: Tensor | None = None,
    shift: Tensor | None = None,
    heads_per_kv_head: int = 1,
    share: bool = True,
    threads: int | None = None,
) -> WorkList:
    """Group the pages of block tables by who reads them.

    Pages before a sequence's queries are read once for all sequences that read the same tokens of them; those that
    hold the queries themselves, each sequence reads for itself. Takes a few sorts of all entries.

    Args:
        tables: page numbers `[rows, slots]`; slots that the length does not reach are not looked at.
        lengths: tokens of each sequence, `[rows]`.
        query_lengths: queries of each, its last tokens, `[rows]`; one each by default.
        first, count: the tokens of each page that belong to the sequence, `[rows, slots]`; all by default.
        shift: position shift of each block, `[rows, slots]`; see `BlockRef`.
        heads_per_kv_head: query heads that share a KV head.
        share: False reads every block of every sequence by itself.
        threads: how many will work; torch's number by default.

    Raises:
        LayoutError: shapes or numbers that do not fit.
    """
    if heads_per_kv_head < 1:
        raise LayoutError(f"{heads_per_kv_head} query heads per KV head")
    table = _Table.read(tables, lengths, block_size, query_lengths, first, count, shift)
    readers = _Readers.of(table)
    segments = _Segments.of(table, readers, block_size, share)
    queries, asked = _queries(table, readers, segments)
    items, parts = _items(segments, asked, heads_per_kv_head, threads or torch.get_num_threads())
    row, slot = np.divmod(segments.entries.number, table.shape[1])
    at_end = slot == table.last_slot[row]
    last_page = np.zeros(table.shape[0], np.int64)
    last_page[row[at_end]] = segments.entries.page[at_end]
    return WorkList(
        shape=table.shape,
        block_size=block_size,
        heads_per_kv_head=heads_per_kv_head,
        lengths=table.lengths,
        query_lengths=table.query_lengths,
        items=_packed(items),
        pages=_packed(segments.pages),
        queries=_packed(queries),
        entries=_packed(segments.entries),
        merge=_packed(_merge(table, readers, queries, asked, parts)),
        turned=readers.turned,
        turned_by=readers.turned_by,
        last_page=last_page,
        room=table.room,
    )


class _Table(NamedTuple):
    """The used entries of the tables, row by row; `position` is that of the first token."""

    shape: tuple[int, int]
    lengths: Ints
    query_lengths: Ints
    row: Ints
    slot: Ints
    page: Ints
    first: Ints
    held: Ints
    shift: Ints
    position: Ints
    last_slot: Ints
    room: Ints

    @classmethod
    def read(
        cls,
        tables: Tensor,
        lengths: Tensor,
        block_size: int,
        query_lengths: Tensor | None,
        first: Tensor | None,
        count: Tensor | None,
        shift: Tensor | None,
    ) -> _Table:
        if tables.dim() != 2 or lengths.shape != tables.shape[:1] or not tables.numel():
            raise LayoutError(f"block tables {list(tables.shape)} and lengths {list(lengths.shape)} do not fit")
        for part in (first, count, shift):
            if part is not None and part.shape != tables.shape:
                raise LayoutError(f"ranges and shifts must be {list(tables.shape)}, got {list(part.shape)}")
        tokens = _ints(lengths)
        asked = np.ones_like(tokens) if query_lengths is None else _ints(query_lengths)
        if asked.shape != tokens.shape or (asked < 1).any() or (asked > tokens).any():
            raise LayoutError("every sequence must have queries, and no more of them than tokens")
        start = np.zeros(tables.shape, np.int64) if first is None else _ints(first)
        held = block_size - start if count is None else _ints(count)
        end = held.cumsum(1)
        used = end - held < tokens[:, None]
        row, slot = used.nonzero()
        last_slot = used.sum(1) - 1
        room = end[np.arange(len(tokens)), last_slot]
        if (room < tokens).any():
            raise LayoutError("a sequence is longer than its block table")
        by = np.zeros(tables.shape, np.int64) if shift is None else _ints(shift)
        page, position, start, held, by = (part[used] for part in (_ints(tables), end - held, start, held, by))
        if (start < 0).any() or (held < 1).any() or (start + held > block_size).any():
            raise LayoutError(f"a range of tokens is empty or outside a page of {block_size}")
        if (page < 0).any():
            raise LayoutError("a page number is negative")
        held = np.minimum(held, tokens[row] - position)
        shape = (tables.shape[0], tables.shape[1])
        return cls(shape, tokens, asked, row, slot, page, start, held, by, position, last_slot, room)


class _Readers(NamedTuple):
    """Who reads: a sequence, or a sequence turned by a shift, in the order of shifts.

    `reader` is by entry of the table, `sequence` and `query_row`, its first query, by reader; `turned` and `turned_by`
    are those of `WorkList`.
    """

    reader: Ints
    sequence: Ints
    query_row: Ints
    turned: Ints
    turned_by: Ints

    @classmethod
    def of(cls, table: _Table) -> _Readers:
        starts = table.query_lengths.cumsum() - table.query_lengths
        if not table.shift.any():
            nobody = np.zeros(0, np.int64)
            return cls(table.row, np.arange(len(starts)), starts, nobody, nobody)
        # A row has few runs of equal shift. They lie in the order of rows, in which a stable sort by shift leaves them.
        runs = _starts(table.shift, table.row)
        order = table.shift[runs].argsort(kind="stable")
        runs_in_order = runs[order]
        kinds = _starts(table.shift[runs_in_order], table.row[runs_in_order])
        number = np.empty_like(order)
        number[order] = np.repeat(np.arange(len(kinds)), np.diff(kinds, append=len(order)))
        reader = np.repeat(number, np.diff(runs, append=len(table.row)))
        shift, sequence = table.shift[runs_in_order[kinds]], table.row[runs_in_order[kinds]]
        query_row, moved = starts[sequence], shift != 0
        sizes = table.query_lengths[sequence[moved]]
        turned = np.repeat(query_row[moved], sizes) + within(sizes)
        query_row[moved] = table.query_lengths.sum() + sizes.cumsum() - sizes
        return cls(reader, sequence, query_row, turned, np.repeat(shift[moved], sizes))


class _Segments(NamedTuple):
    """Pages in the order of segments; `num_pages`, `columns`, `entry_from` and `num_readers` of each segment; the
    readers of the segments one after the other, with the columns that are theirs."""

    pages: Pages
    entries: Entries
    num_pages: Ints
    columns: Ints
    entry_from: Ints
    num_readers: Ints
    readers: Ints
    column_from: Ints
    column_to: Ints

    @classmethod
    def of(cls, table: _Table, readers: _Readers, block_size: int, share: bool) -> _Segments:
        window = (table.lengths - table.query_lengths)[table.row]
        alone = table.position + table.held > window
        key = (table.page * (block_size + 1) + table.first) * (block_size + 1) + table.held
        one_by_one = int(key.max()) + 1 + np.arange(len(key))
        key = np.where(alone, one_by_one, key) if share else one_by_one
        order = np.lexsort((readers.reader, key)) if len(readers.turned) else key.argsort(kind="stable")
        starts = _starts(key[order])
        sizes = np.diff(starts, append=len(order))
        kind = _equal_runs(readers.reader[order], starts, sizes)
        by_segment = kind.argsort(kind="stable")
        first_page = _starts(kind[by_segment])
        sizes, starts = sizes[by_segment], starts[by_segment]
        entry = order[np.repeat(starts, sizes) + within(sizes)]
        shown = order[starts]
        offset = np.where(alone, table.position - window, SEEN_BY_ALL)
        columns, entry_from = sizes[first_page], (sizes.cumsum() - sizes)[first_page]
        segment = np.repeat(np.arange(len(columns)), columns)
        column, reader = within(columns), readers.reader[entry][np.repeat(entry_from, columns) + within(columns)]
        start = _starts(segment * len(readers.sequence) + reader)
        end = np.append(start[1:], len(reader)) - 1
        return cls(
            pages=Pages(table.page[shown], table.first[shown], table.held[shown], offset[shown]),
            entries=Entries(
                number=(table.row * table.shape[1] + table.slot)[entry],
                page=np.repeat(np.arange(len(sizes)), sizes),
                shift=table.shift[entry],
            ),
            num_pages=np.diff(first_page, append=len(sizes)),
            columns=columns,
            entry_from=entry_from,
            num_readers=np.bincount(segment[start]),
            readers=reader[start],
            column_from=column[start],
            column_to=column[end] + 1,
        )


def _equal_runs(values: Ints, starts: Ints, sizes: Ints) -> Ints:
    """A number for each run of `values`, the same for runs that are equal; by sums of random numbers, then verified.

    Mostly a run is as its neighbour, so that few sums need be sorted.
    """
    for seed in range(100):
        random = np.random.default_rng(seed).integers(2**63, size=int(values.max()) + 1, dtype=np.uint64)
        sums = np.add.reduceat(random[values], starts)
        unlike = _starts(sums)
        _, example, kind = np.unique(sums[unlike], return_index=True, return_inverse=True)
        kind = np.repeat(kind.reshape(-1), np.diff(unlike, append=len(sums)))
        like = unlike[example][kind]
        if (sizes == sizes[like]).all() and (values == values[np.repeat(starts[like], sizes) + within(sizes)]).all():
            return kind
    raise IntegrityError("sums of random numbers keep colliding")


def _queries(table: _Table, readers: _Readers, segments: _Segments) -> tuple[Queries, Ints]:
    """The queries of every segment, and how many each has."""
    asked = table.query_lengths[readers.sequence[segments.readers]]
    seen = within(asked)
    row = np.repeat(readers.query_row[segments.readers], asked) + seen
    columns = (np.repeat(column, asked) for column in (segments.column_from, segments.column_to))
    return Queries(row, seen, *columns), np.add.reduceat(asked, segments.num_readers.cumsum() - segments.num_readers)


def _items(segments: _Segments, asked: Ints, heads_per_kv_head: int, threads: int) -> tuple[Items, Ints]:
    """Segments of `asked` queries cut into items that keep all threads busy, and how many parts each segment has."""
    parts = np.ones_like(asked)
    blocks = -(-asked // max(1, MOST_ROWS // heads_per_kv_head))
    if threads > 1:
        cost = segments.num_pages * (PAGE_COST + asked * heads_per_kv_head)
        wanted = cost * (threads * ITEMS_PER_THREAD) // int(cost.sum())
        parts = np.clip(-(-wanted // blocks), 1, np.maximum(1, segments.num_pages // FEWEST_PAGES))
    segment = np.repeat(np.arange(len(parts)), parts * blocks)
    part, block = np.divmod(within(parts * blocks), blocks[segment])
    page_from, query_from, partial_from = (
        (sizes.cumsum() - sizes)[segment] for sizes in (segments.num_pages, asked, parts * asked)
    )
    begin, end = (segments.num_pages[segment] * (part + i) // parts[segment] for i in (0, 1))
    first, last = (asked[segment] * (block + i) // blocks[segment] for i in (0, 1))
    items = Items(
        page_from=page_from + begin,
        page_to=page_from + end,
        query_from=query_from + first,
        query_to=query_from + last,
        columns=segments.columns[segment],
        partial=partial_from + part * asked[segment] + first,
        entry=segments.entry_from[segment] + begin * segments.columns[segment],
    )
    return items, parts


def _merge(table: _Table, readers: _Readers, queries: Queries, asked: Ints, parts: Ints) -> Merge:
    """Which partial outputs make each query: they lie by segment, part and query."""
    total = int(table.query_lengths.sum())
    original = np.append(np.arange(total), readers.turned)
    sizes, query_from = np.repeat(asked, parts), np.repeat(asked.cumsum() - asked, parts)
    made = original[queries.row[np.repeat(query_from, sizes) + within(sizes)]]
    return Merge(np.append(0, np.bincount(made, minlength=total).cumsum()), made.argsort(kind="stable"))


def _packed(parts: Arrays) -> Arrays:
    return type(parts)(*(part.astype(np.int32) for part in parts))


def _ints(numbers: Tensor) -> Ints:
    if numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise LayoutError(f"block tables, lengths and ranges are integers, got {numbers.dtype}")
    return numbers.numpy(force=True).astype(np.int64)


def _starts(*columns: Ints) -> Ints:
    """Where a new value begins in any of them."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = reduce(np.logical_or, (column[1:] != column[:-1] for column in columns))
    return new.nonzero()[0]
