"""Where the text of one request is resident, in pages as they stand or in pages still to be written from others."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import Echoes, Known
from jointkv.core.moved import Fills
from jointkv.core.moved_text import UNWRITTEN, MovedText, unwritten
from jointkv.core.reuse import Found, Integers, Run
from jointkv.vllm_plugin.messages import Pair
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents


class ResidentText:
    """What was found for the blocks `first` to `end` of `tracked`. Pages that are not written yet have numbers too.

    Args:
        least: blocks of a stretch at another position at the least.

    Attributes:
        found: all of it.
    """

    def __init__(
        self, residents: Residents, tracked: TrackedRequest, first: int, end: int, group: int, least: int
    ) -> None:
        self.tracked, self._residents, self._offers = tracked, residents, residents.offers
        self.found = residents.find(tracked, first, end, group)
        self._moved: MovedText | None = residents.find_moved(tracked, first, end, least)
        if self._moved is not None:
            self.found = self.found.beside(self._moved.found)
            self._origins = residents.source[self._moved.fills.first]

    def known(self, slots: Integers, pages: Integers) -> Known:
        """What evidence says of `pages [n]` for the blocks `slots [n]`."""
        moved = unwritten(pages)
        known = self._residents.known(self.tracked, slots, np.where(moved, 0, pages))
        if self._moved is not None and moved.any():
            evidence = self._residents.evidence_moved, self._residents.evidence
            elsewhere = self._moved.known(*evidence, pages[moved], self._standing(slots[moved]))
            for column in ("count", "worst", "new"):
                getattr(known, column)[moved] = getattr(elsewhere, column)
        return known

    def source(self, page: int) -> int:
        """The source of `page`, one of those that were found."""
        return int(self.found.source[self.found.page == page][0])

    def exact(self, pages: Integers) -> NDArray[np.bool_]:
        """Which of `pages [n]` were computed behind nothing that was reused or fused, and stand where they are read."""
        found: NDArray[np.bool_] = ~unwritten(pages) & self._residents.exact[np.where(unwritten(pages), 0, pages)]
        return found

    def holds(self, run: Run) -> NDArray[np.bool_]:
        """Which pages of `run` are resident, or can be written, as when they were found: bool `[len(run.pages)]`."""
        return self._unchanged(run.pages)

    @property
    def is_whole(self) -> bool:
        """Whether everything is resident still that was found."""
        return bool(self._unchanged(self.found.page).all())

    @cached_property
    def standing(self) -> Integers:
        """Pages that hold text where it is read, one of each slot at most: int64 `[n]`."""
        still = self.found.where(~unwritten(self.found.page))
        pages: Integers = still.page[np.unique(still.slot, return_index=True)[1]]
        return pages

    @cached_property
    def elsewhere(self) -> Found:
        """What stands at other positions alone, one of each slot at most."""
        moved = unwritten(self.found.page)
        found = self.found.where(moved & ~np.isin(self.found.slot, self.found.slot[~moved]))
        return found.where(np.unique(found.slot, return_index=True)[1])

    def can_be_written(self, pages: Integers) -> NDArray[np.bool_]:
        """Which of `pages [n]`, which are not written yet, have their sources still: bool `[n]`."""
        assert self._moved is not None
        fills, there = self.fills(pages), self._residents.unchanged
        return there(fills.first, self._offers) & there(fills.second, self._offers)

    def origins(self, pages: Integers) -> Integers:
        """Numbers of the requests whose text `pages [n]`, which are not written yet, will hold: int64 `[n]`."""
        found: Integers = self._origins[pages - UNWRITTEN]
        return found

    def testify(self, slots: Integers, pages: Integers, ratios: NDArray[np.floating]) -> None:
        """The blocks `slots [n]` were computed, and found to be so far from `pages [n]`: error over bound."""
        moved = unwritten(pages)
        self._residents.testify(self.tracked, slots[~moved], pages[~moved], ratios[~moved].astype(np.float32))
        if self._moved is not None and moved.any():
            seen = self._standing(slots[moved])
            self._moved.testify(self._residents.evidence_moved, pages[moved], ratios[moved], seen)

    def fills(self, pages: Integers) -> Fills:
        """By what `pages [n]`, which are not written yet, are written."""
        assert self._moved is not None
        return self._moved.fills_of(pages)

    def offer(self, slots: Integers, numbers: Integers, pages: Integers) -> None:
        """Let others find `pages [n]`, to which the blocks `slots [n]` are written that had these `numbers [n]`."""
        assert self._moved is not None
        self._residents.add_filled(self.tracked, self._moved, slots, numbers, pages)

    def pair(self, group: int, own: int, page: int) -> Pair:
        """The question how far the block in page `own` is from what `page` holds, or will."""
        if not unwritten(np.array([page]))[0]:
            return Pair(group, own, page)
        fill = self.fills(np.array([page]))
        return Pair(group, own, *(int(column[0]) for column in (fill.first, fill.second, fill.offset, fill.shift)))

    def _unchanged(self, pages: Integers) -> NDArray[np.bool_]:
        """Which of `pages [n]`, written or not, are what they were when they were found: bool `[n]`."""
        moved = unwritten(pages)
        same = self._residents.unchanged(np.where(moved, 0, pages), self._offers)
        if moved.any():
            same[moved] = self.can_be_written(pages[moved])
        return same

    def _standing(self, slots: Integers) -> Echoes:
        return self.tracked.standing(0, int(slots.max()) + 1 if len(slots) else 0)[slots]
