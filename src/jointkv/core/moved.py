"""Text of a prompt that stands elsewhere in other requests: at another position, in other blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from jointkv.core.reuse import Integers
from jointkv.errors import LayoutError


@dataclass(frozen=True, eq=False)
class MovedRun:
    """Consecutive tokens of a prompt that are resident in one other request's pages, in the same order.

    Attributes:
        first: index of the first token in the prompt.
        tokens: how many.
        source: the other request, by a number.
        skip: tokens of the first page that stand before the run.
        pages: that hold it, in order, int64 `[n]`.
        shift: by how many tokens the prompt has it later than the source; may be negative.

    Raises:
        LayoutError: no pages, or nothing in them.
    """

    first: int
    tokens: int
    source: int
    skip: int
    pages: Integers
    shift: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or not len(self.pages) or self.skip < 0 or self.first < 0:
            raise LayoutError(f"{self.tokens} tokens from {self.first} on in {len(self.pages)} pages")

    @property
    def end(self) -> int:
        """Index behind the last token."""
        return self.first + self.tokens

    def within(self, start: int, end: int, block_size: int) -> MovedRun | None:
        """The part of it from token `start` to `end` of the prompt; None if there is none."""
        start, end = max(start, self.first), min(end, self.end)
        if start >= end:
            return None
        offset = self.skip + start - self.first
        last = self.skip + end - 1 - self.first
        pages = self.pages[offset // block_size : last // block_size + 1]
        return MovedRun(start, end - start, self.source, offset % block_size, pages, self.shift)

    def fills(self, block_size: int) -> Fills:
        """The prompt's whole blocks that can be written from it."""
        slots = np.arange(-(-self.first // block_size), self.end // block_size)
        place = slots * block_size - self.first + self.skip
        before, offset = place // block_size, place % block_size
        # The second page of a block that needs one only is the first.
        after = np.where(offset, before + 1, before)
        return Fills(slots, self.pages[before], self.pages[after], offset, np.full(len(slots), self.shift))


@dataclass(frozen=True, eq=False)
class Fills:
    """Whole blocks of a prompt, each to be written from one page or two that hold its text at another position.

    Attributes:
        slots: of the prompt, int64 `[n]`.
        first, second: pages that hold the beginning and the rest, int64 `[n]`; equal where one holds all.
        offset: of the block's first token in the page `first`, int64 `[n]`.
        shift: by how many tokens the block stands later than in the pages, int64 `[n]`.
    """

    slots: Integers
    first: Integers
    second: Integers
    offset: Integers
    shift: Integers

    def __len__(self) -> int:
        return len(self.slots)

    def where(self, chosen: NDArray[np.bool_] | Integers) -> Fills:
        """Those of them that are `chosen`: bool `[n]`, or indices."""
        return Fills(*(column[chosen] for column in (self.slots, self.first, self.second, self.offset, self.shift)))

    @classmethod
    def join(cls, parts: Sequence[Fills]) -> Fills:
        """All of `parts`, in their order."""
        none = np.zeros(0, np.int64)
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        return cls(*(np.concatenate([none, *column]) for column in columns))
