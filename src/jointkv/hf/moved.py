"""Blocks of a prompt whose text is resident at another position: what they would hold, before any page does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jointkv.attention.rotary import Rotary, moved_blocks
from jointkv.core.blocks import LayerAggregate, PagedKV, ServedErrors, served_errors
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
        rotary: of each layer.
    """

    fills: Fills
    run: Integers
    rotary: Sequence[Rotary]

    @classmethod
    def of(cls, runs: Sequence[MovedRun], start: int, end: int, block_size: int, rotary: Sequence[Rotary]) -> MovedText:
        """Of the blocks from slot `start` to `end` those that `runs` give; text that has not moved is left out."""
        parts = [run.within(start * block_size, end * block_size, block_size) for run in runs if run.shift]
        fills = [part.fills(block_size) for part in parts if part is not None]
        number = np.repeat(np.arange(len(fills)), [len(part) for part in fills])
        return cls(Fills.join(fills), number, rotary)

    @property
    def found(self) -> Found:
        """As planning wants it: a source for every run, and pages that are not written yet."""
        count = len(self.fills)
        return Found(self.fills.slots, UNWRITTEN + np.arange(count), UNWRITTEN + self.run, np.ones(count, bool))

    def blocks(self, kv: PagedKV, pages: Integers) -> PagedKV:
        """What `pages [n]`, which are not written yet, will hold."""
        return moved_blocks(kv, self.fills.where(pages - UNWRITTEN), self.rotary)

    def errors(self, kv: PagedKV, own: torch.Tensor, pages: Integers, aggregate: LayerAggregate) -> ServedErrors:
        """As `served_errors`, if the blocks in the pages `own [n]` were read from `pages [n]`."""
        would = self.blocks(kv, pages)
        joined = PagedKV(
            *(
                [torch.cat((layer[own], other)) for layer, other in zip(layers, others, strict=True)]
                for layers, others in ((kv.keys, would.keys), (kv.values, would.values))
            )
        )
        return served_errors(joined, torch.arange(len(pages)), len(pages) + torch.arange(len(pages)), aggregate)

    def known(self, evidence: Evidence, pages: Integers, standing: Echoes, block_size: int) -> Known:
        """What evidence says of `pages [n]` for blocks with the echoes `standing [n]`.

        Witnesses were compared at the source's position, so none counts for a block that has moved; what they say
        against a page does.
        """
        fills = self.fills.where(pages - UNWRITTEN)
        worst = np.maximum(evidence.worst[fills.first], evidence.worst[fills.second])
        covered = _shifted(evidence.covered[fills.first], evidence.covered[fills.second], fills.offset, block_size)
        return Known(np.zeros(len(pages), np.int64), worst, np.asarray(standing & ~covered) != 0)


def _shifted(first: Echoes, second: Echoes, offset: Integers, block_size: int) -> Echoes:
    """Bits of a block whose first token is token `offset [n]` of one page, and whose rest begins another."""
    by = offset.astype(np.uint64)
    # Of a shift by 64 numpy gives anything.
    rest = np.where(offset > 0, second << (np.uint64(block_size) - np.maximum(by, np.uint64(1))), np.uint64(0))
    return np.asarray((first >> by) | rest)


def check_block_size(block_size: int) -> None:
    """Raises InvalidPolicy for blocks whose text cannot be found, or its echoes not be told apart, elsewhere."""
    if block_size % 2 or block_size > PLACES:
        raise InvalidPolicy(f"reuse: text that moved needs an even block size up to {PLACES}, not {block_size}")


def unwritten(pages: Integers) -> NDArray[np.bool_]:
    """Which of `pages [n]` there are not yet."""
    found: NDArray[np.bool_] = pages >= UNWRITTEN
    return found
