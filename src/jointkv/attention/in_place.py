"""Text that is read where it is resident, though it stands at another position: ranges of pages, and a shift.

A block whose text stands elsewhere lies in one page or in two. Attention takes any range of a page, and turns the query
instead of the keys, so that nothing need be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jointkv.core.moved import Fills
from jointkv.core.plan import BlockRef
from jointkv.errors import LayoutError


@dataclass(frozen=True, eq=False)
class Ranges:
    """What sequences read, in order: tokens of pages, int64 `[rows, entries]` each, as `group_pages` takes them.

    Rows with fewer entries end with page 0, which no length reaches.
    """

    pages: Tensor
    first: Tensor
    count: Tensor
    shift: Tensor

    def references(self, row: int, length: int) -> Iterator[BlockRef]:
        """Of one sequence of `length` tokens."""
        columns = (part[row].tolist() for part in (self.pages, self.first, self.count, self.shift))
        for page, first, count, shift in zip(*columns, strict=True):
            if length <= 0:
                return
            yield BlockRef(page, shift=shift, first=first, count=min(count, length))
            length -= count


def in_ranges(tables: Tensor, block_size: int, moved: Mapping[int, Fills]) -> Ranges:
    """Block tables in which some slots read text where it is.

    Args:
        tables: page numbers `[rows, slots]`; those of the slots that `moved` names are not looked at.
        moved: by row, which slots read which pages from which token on, and by how much they stand later.

    Raises:
        LayoutError: a slot beyond the table.
    """
    rows, slots = tables.shape
    fills = Fills.join(list(moved.values()))
    if len(fills) and fills.slots.max() >= slots:
        raise LayoutError(f"slot {fills.slots.max()} of {slots} reads text at another position")
    where = np.repeat(np.array(list(moved), np.int64) * slots, [len(part) for part in moved.values()]) + fills.slots
    split = fills.offset > 0  # lies in a second page
    rest, pieces = fills.where(split), np.ones(rows * slots, np.int64)
    pieces[where[split]] = 2
    at = pieces.cumsum() - pieces
    begin, behind = at[where], at[where[split]] + 1
    page = np.repeat(tables.numpy(force=True).reshape(-1), pieces).astype(np.int64)
    first, shift = np.zeros((2, len(page)), np.int64)
    count = np.full(len(page), block_size)
    page[begin], first[begin], shift[begin] = fills.first, fills.offset, fills.shift
    count[begin] = block_size - fills.offset
    page[behind], count[behind], shift[behind] = rest.second, rest.offset, rest.shift
    row = np.repeat(np.arange(rows), pieces.reshape(rows, slots).sum(1))
    goes_on = np.zeros(len(row), bool)  # the second part of a block and the first of the next are one piece of a page
    goes_on[1:] = (row[1:] == row[:-1]) & (page[1:] == page[:-1]) & (shift[1:] == shift[:-1])
    goes_on[1:] &= first[1:] == first[:-1] + count[:-1]
    (starts,) = np.nonzero(~goes_on)
    count = np.add.reduceat(count, starts)
    entries = np.bincount(row[starts], minlength=rows)
    used = np.arange(int(entries.max())) < entries[:, None]
    found = []
    for column, unused in ((page[starts], 0), (first[starts], 0), (count, block_size), (shift[starts], 0)):
        table = np.full(used.shape, unused, np.int64)
        table[used] = column
        found.append(torch.from_numpy(table))
    return Ranges(*found)
