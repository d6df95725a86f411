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

from jointkv.attention.work import Ints, within
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
    still = np.ones((rows, slots), bool)
    parts: list[list[Ints]] = []
    for number, fills in moved.items():
        if len(fills) and fills.slots.max() >= slots:
            raise LayoutError(f"slot {fills.slots.max()} of {slots} reads text at another position")
        still[number, fills.slots] = False
        rest = fills.where(fills.offset > 0)  # lies in a second page
        all_of, second = np.full(len(fills), number), np.full(len(rest), number)
        held = block_size - fills.offset
        parts.append([all_of, 2 * fills.slots, fills.first, fills.offset, held, fills.shift])
        parts.append([second, 2 * rest.slots + 1, rest.second, np.zeros_like(second), rest.offset, rest.shift])
    row, slot = still.nonzero()
    none = np.zeros_like(row)
    parts.append([row, 2 * slot, tables.numpy(force=True)[row, slot], none, none + block_size, none])
    columns = [np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    row, _, page, first, count, shift = (column[order] for column in columns)
    goes_on = np.zeros(len(row), bool)  # the second part of a block and the first of the next are one piece of a page
    goes_on[1:] = (row[1:] == row[:-1]) & (page[1:] == page[:-1]) & (shift[1:] == shift[:-1])
    goes_on[1:] &= first[1:] == first[:-1] + count[:-1]
    (starts,) = np.nonzero(~goes_on)
    count = np.add.reduceat(count, starts)
    row, page, first, shift = (column[starts] for column in (row, page, first, shift))
    entries = np.bincount(row, minlength=rows)
    found = []
    for column, unused in ((page, 0), (first, 0), (count, block_size), (shift, 0)):
        table = np.full((rows, int(entries.max())), unused, np.int64)
        table[row, within(entries)] = column
        found.append(torch.from_numpy(table))
    return Ranges(*found)
