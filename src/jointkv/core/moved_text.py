"""Text of one prompt that is resident at other positions, as planning wants it: pages that are not written yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import PLACES, Echoes, Evidence, Known
from jointkv.core.moved import Fills, MovedRun
from jointkv.core.reuse import Found, Integers
from jointkv.errors import InvalidPolicy

UNWRITTEN = 1 << 40
"""Numbers from here on stand for pages that are written when they are adopted; pools have fewer pages."""


@dataclass(frozen=True, eq=False)
class MovedText:
    """What of one prompt could be written from resident text.

    Attributes:
        fills: one per block, slots in order.
        run: which of the runs each belongs to, int64 `[n]`.
        block_size: tokens per page.
    """

    fills: Fills
    run: Integers
    block_size: int

    @classmethod
    def of(cls, runs: Sequence[MovedRun], start: int, end: int, block_size: int) -> MovedText:
        """Of the blocks from slot `start` to `end` those that `runs` give."""
        parts = [run.within(start * block_size, end * block_size, block_size) for run in runs]
        fills = [part.fills(block_size) for part in parts if part is not None]
        number = np.repeat(np.arange(len(fills)), [len(part) for part in fills])
        return cls(Fills.join(fills), number, block_size)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.fills)

    @property
    def sources(self) -> Integers:
        """The resident pages that would be read, each once."""
        second = self.fills.second[self.fills.offset > 0]
        return np.unique(np.concatenate((self.fills.first, second)))

    @property
    def found(self) -> Found:
        """As planning wants it: a source for every run, and pages that are not written yet.

        Not `exact`, so that a page that need not be written goes first.
        """
        count = len(self.fills)
        return Found(self.fills.slots, UNWRITTEN + np.arange(count), UNWRITTEN + self.run, np.zeros(count, bool))

    def fills_of(self, pages: Integers) -> Fills:
        """By what `pages [n]`, which are not written yet, are written."""
        return self.fills.where(pages - UNWRITTEN)

    def known(self, moved: Evidence, still: Evidence, pages: Integers, standing: Echoes) -> Known:
        """What evidence says of `pages [n]` for blocks with the echoes `standing [n]`.

        Args:
            moved: of witnesses at other positions, which count as far as both pages of a block have them.
            still: of witnesses at the source's position: what they say against a page holds here too.
        """
        fills = self.fills_of(pages)
        worst = [evidence.worst[side] for evidence in (moved, still) for side in (fills.first, fills.second)]
        count = np.minimum(moved.count[fills.first], moved.count[fills.second])
        return Known(count, np.maximum.reduce(worst), np.asarray(standing & ~self.covered(moved, pages)) != 0)

    def covered(self, moved: Evidence, pages: Integers) -> Echoes:
        """The echoes that clean witnesses of the sources cover, by the places of the tokens in `pages [n]`."""
        fills = self.fills_of(pages)
        by, rest = self._shifts(fills)
        first, second = moved.covered[fills.first], moved.covered[fills.second]
        found: Echoes = (first >> by) | np.where(fills.offset > 0, second << rest, np.uint64(0))
        return found

    def testify(self, moved: Evidence, pages: Integers, ratios: NDArray[np.floating], standing: Echoes) -> None:
        """Blocks with the echoes `standing [n]` were computed, and `ratios [n]` from `pages [n]`."""
        fills, ratios = self.fills_of(pages), ratios.astype(np.float32)
        by, rest = self._shifts(fills)
        whole = np.uint64((1 << self.block_size) - 1)
        for side, seen, said in (
            (fills.first, standing << by & whole, slice(None)),
            (fills.second, standing >> rest, fills.offset > 0),
        ):
            one, first = np.unique(side[said], return_index=True)  # a text may stand in a prompt twice
            moved.add(one, ratios[said][first], seen[said][first])

    def _shifts(self, fills: Fills) -> tuple[Echoes, Echoes]:
        """By how many bits echoes of a block are shifted against those of its first page and, there, of its second."""
        by = fills.offset.astype(np.uint64)
        # By a whole word numpy shifts in any way; where the second page holds nothing it does not count.
        return by, np.minimum(np.uint64(self.block_size) - by, np.uint64(PLACES - 1))


def check_block_size(block_size: int) -> None:
    """Raises InvalidPolicy for blocks whose text cannot be found, or its echoes not be told apart, elsewhere."""
    if block_size % 2 or block_size > PLACES:
        raise InvalidPolicy(f"reuse: text that moved needs an even block size up to {PLACES}, not {block_size}")


def unwritten(pages: Integers) -> NDArray[np.bool_]:
    """Which of `pages [n]` there are not yet."""
    found: NDArray[np.bool_] = pages >= UNWRITTEN
    return found
