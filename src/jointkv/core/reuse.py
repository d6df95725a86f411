"""Planning what a prompt need not compute: runs of resident text, and which slot is to read which page.

Nothing here knows an engine, and nothing is changed: `Runs` says what could be reused, `ReusePlan` what will be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import LayoutError

Integers = NDArray[np.int64]

COMPUTED = -1
"""In a plan: this slot reads a page of its own, which is computed."""


@dataclass(frozen=True, eq=False)
class Found:
    """Resident blocks with the tokens, position and isolation key of blocks of one prompt, in the order of their slots.

    Attributes:
        slot: of the prompt's block, int64 `[n]`.
        page: that holds the text, int64 `[n]`.
        source: number of the request that computed the page, int64 `[n]`.
        exact: whether all before it was computed too, or an exact hit, bool `[n]`.

    Raises:
        LayoutError: they differ in length, or the slots are not in order.
    """

    slot: Integers
    page: Integers
    source: Integers
    exact: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if len({len(self.slot), len(self.page), len(self.source), len(self.exact)}) > 1:
            raise LayoutError(f"{len(self.slot)} slots, {len(self.page)} pages, {len(self.source)} sources")
        if (self.slot[1:] < self.slot[:-1]).any():
            raise LayoutError("slots out of order")

    def __len__(self) -> int:
        return len(self.slot)

    def beside(self, other: Found) -> Found:
        """Both together; of equal slots these come first."""
        pairs = ((self.slot, other.slot), (self.page, other.page), (self.source, other.source))
        slot, page, source = (np.concatenate(pair) for pair in pairs)
        order = np.argsort(slot, kind="stable")
        exact = np.concatenate((self.exact, other.exact))
        return Found(slot[order], page[order], source[order], exact[order])

    def where(self, chosen: NDArray[np.bool_] | Integers) -> Found:
        """Those of them that are `chosen`: bool `[n]`, or indices in order."""
        if chosen.dtype == np.bool_ and chosen.all():
            return self
        return Found(self.slot[chosen], self.page[chosen], self.source[chosen], self.exact[chosen])

    def first_by(self, key: NDArray[np.floating]) -> Integers:
        """Of each slot the one with the smallest `key [n]`, of equal ones the first; indices, in O(n)."""
        if not len(self.slot):
            return np.zeros(0, np.int64)
        starts = np.flatnonzero(np.diff(self.slot, prepend=-1))
        smallest = np.repeat(np.minimum.reduceat(key, starts), np.diff(starts, append=len(key)))
        is_it = np.flatnonzero(key == smallest)
        first: Integers = is_it[np.diff(self.slot[is_it], prepend=-1) != 0]
        return first

    def stretches(self, least: int) -> list[range]:
        """Stretches of at least `least` slots that are resident, in whatever pages."""
        slots = self.slot[np.diff(self.slot, prepend=-1) != 0]
        parts = np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1)
        return [range(int(part[0]), int(part[-1]) + 1) for part in parts if len(part) >= least]

    def runs(self, wanted: NDArray[np.bool_] | None = None) -> Runs:
        """Of each source, see `Runs`."""
        return Runs(self.slot, self.page, self.source, wanted)


@dataclass(frozen=True)
class Run:
    """Consecutive slots of a request whose tokens are resident in one other request's pages, in the same order.

    Attributes:
        first: slot of the first block.
        source: the other request, by a number.
        pages: of the slots from `first` on, int64 `[n]`.
    """

    first: int
    source: int
    pages: Integers

    @property
    def end(self) -> int:
        """The slot behind the last one."""
        return self.first + len(self.pages)

    @property
    def behind(self) -> Run:
        """What follows the first block, which is the entry block."""
        return Run(self.first + 1, self.source, self.pages[1:])


class Runs:
    """All runs of a prompt, found in O(n) from where its blocks are resident.

    Args:
        slot, page, source: of `n` resident blocks with the tokens, position and isolation key of a block of the
            prompt: that block's slot, in order, the page, and the request it was computed in; int64 `[n]`. Of several
            pages of one source at one slot the first counts.
        wanted: bool `[n]`; runs begin and end with a block of these, and those without one are none. None: all are.

    Raises:
        LayoutError: they differ in length, or the slots are not in order.
    """

    def __init__(
        self, slot: Integers, page: Integers, source: Integers, wanted: NDArray[np.bool_] | None = None
    ) -> None:
        wanted = np.ones(len(slot), bool) if wanted is None else wanted
        if not len(slot) == len(page) == len(source) == len(wanted):
            raise LayoutError(f"{len(slot)} slots, {len(page)} pages and {len(source)} sources")
        if (slot[1:] < slot[:-1]).any():
            raise LayoutError("slots out of order")
        order = _grouped(source)
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(source[order]) != 0) | (np.diff(slot[order]) != 0)
        order = order[new]
        slot, page, source, wanted = slot[order], page[order], source[order], wanted[order]
        starts = np.ones(len(slot), bool)
        starts[1:] = (source[1:] != source[:-1]) | (slot[1:] != slot[:-1] + 1)
        (ends,) = np.nonzero(wanted)
        run = np.cumsum(starts)[ends]
        self._offset = ends[np.diff(run, prepend=0) != 0]
        self._first, self._source, self._page = slot[self._offset], source[self._offset], page
        self._end = slot[ends[np.diff(run, append=0) != 0]] + 1

    def __len__(self) -> int:
        """Number of runs."""
        return len(self._first)

    def next_entry(self, start: int, end: int, least: int) -> int | None:
        """The first slot from `start` on at which a run has at least `least` blocks before `end`; None if none has."""
        first = np.maximum(self._first, start)
        first = first[np.minimum(self._end, end) - first >= least]
        return int(first.min()) if len(first) else None

    def through(self, slot: int, end: int, least: int, count: int) -> list[Run]:
        """Runs of at least `least` blocks from `slot` on, cut at `end`: at most `count`, the longest first."""
        last = np.minimum(self._end, end)
        found = np.flatnonzero((self._first <= slot) & (last - slot >= least))
        longest = found[np.argsort(slot - last[found], kind="stable")][:count]
        return [
            Run(slot, int(self._source[run]), self._page[begin : begin + int(last[run]) - slot])
            for run in longest
            for begin in (int(self._offset[run]) + slot - int(self._first[run]),)
        ]


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """Which slots of a prompt read resident pages before anything is computed.

    Attributes:
        pages: per slot of the prompt that may be reused, int64 `[slots]`: a page, or `COMPUTED`.
    """

    pages: Integers

    @classmethod
    def nothing(cls, slots: int) -> ReusePlan:
        """All of `slots` are computed."""
        return cls(np.full(slots, COMPUTED, np.int64))

    def adopting(self, first: int, pages: Integers, least: int) -> ReusePlan:
        """This plan, where the slots from `first` on read `pages [n]` as well, except where these say `COMPUTED`.

        Args:
            least: stretches of fewer blocks than that are computed.

        Raises:
            LayoutError: the pages go beyond the prompt.
        """
        if first + len(pages) > len(self.pages):
            raise LayoutError(f"{len(pages)} pages from {first} on for {len(self.pages)} slots")
        result = self.pages.copy()
        for stretch in stretches(pages != COMPUTED):
            if len(stretch) >= least:
                result[first + stretch.start : first + stretch.stop] = pages[stretch.start : stretch.stop]
        return replace(self, pages=result)

    @property
    def skipped(self) -> int:
        """Number of slots that are not computed."""
        return int((self.pages != COMPUTED).sum())

    def computed(self, first: int, end: int) -> int:
        """Number of slots from `first` to `end` that are computed."""
        return int((self.pages[first:end] == COMPUTED).sum())

    @property
    def reused(self) -> list[range]:
        """Stretches of slots that read resident pages, in order."""
        return list(stretches(self.pages != COMPUTED))

    @property
    def gaps(self) -> list[range]:
        """Stretches of computed slots before a reused one, in order; what comes behind the last is the tail."""
        last = max((stretch.stop for stretch in self.reused), default=0)
        return list(stretches(self.pages[:last] == COMPUTED))


def _grouped(numbers: Integers) -> Integers:
    """Indices that bring equal `numbers [n]` together and leave the order of equal ones."""
    if len(numbers) and numbers.max() - numbers.min() < 2**16:
        numbers = (numbers - numbers.min()).astype(np.uint16)  # sorted in linear time
    return np.argsort(numbers, kind="stable")


def stretches(mask: NDArray[np.bool_]) -> Iterator[range]:
    """Maximal ranges of indices at which `mask [n]` is true, in order."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield range(start, stop)
