"""Writes pages of text that moved: from the pages that hold it at another position, K turned, V as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jointkv.attention.rotary import Rotary, moved_blocks
from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills
from jointkv.core.packed import PackedPages

AT_A_TIME = 8
"""Blocks that are compared before any page holds them: so many pages of memory, twice."""


@dataclass(frozen=True)
class NumberOrder:
    """Which element of a page is which number.

    Attributes:
        keys, values: long `[tokens, heads, size]`.
    """

    keys: Tensor
    values: Tensor


class PageFiller:
    """What blocks of text at another position would hold, and have pages hold it.

    Args:
        pages: of the KV-cache group.
        order: of their elements.
        rotary: how each layer turns its keys.
    """

    def __init__(self, pages: PackedPages, order: NumberOrder, rotary: Sequence[Rotary]) -> None:
        self.pages, self._rotary = pages, rotary
        self._shapes = order.keys.shape, order.values.shape
        self._elements = tuple(side.flatten().to(pages.device) for side in (order.keys, order.values))
        shape = 2 * AT_A_TIME, pages.layers[0].shape[1]
        beside = [torch.zeros(shape, dtype=pages.dtype, device=pages.device) for _ in pages.layers]
        self._beside = PackedPages(beside, pages.token_of, pages.is_value)

    def fill(self, targets: np.ndarray, fills: Fills) -> None:
        """Write the blocks of `fills [n]` to the pages `targets [n]`: of a layer all are read, then all are written."""
        with torch.inference_mode():
            index = torch.from_numpy(targets).to(self.pages.device)
            for layer, blocks in zip(self.pages.layers, self._blocks(fills), strict=True):
                layer.index_copy_(0, index, blocks)

    def compared(self, own: np.ndarray, fills: Fills) -> Iterator[tuple[slice, PackedPages, Tensor]]:
        """The pages `own [n]` beside what pages written by `fills [n]` would hold, in parts.

        Yields:
            Which of them, pages good until the next part is asked for, and the numbers of the own ones in them; those
            of the others follow directly.
        """
        for start in range(0, len(own), AT_A_TIME):
            part = slice(start, start + AT_A_TIME)
            index = torch.from_numpy(own[part]).to(self.pages.device)
            blocks = self._blocks(fills.where(np.arange(len(own))[part]))
            for layer, beside, other in zip(self.pages.layers, self._beside.layers, blocks, strict=True):
                torch.index_select(layer, 0, index, out=beside[: len(index)])
                beside[len(index) : 2 * len(index)] = other
            yield part, self._beside, torch.arange(len(index))

    def _blocks(self, fills: Fills) -> Iterator[Tensor]:
        """Of each layer the blocks of `fills [n]` as pages hold them, `[n, elements]`."""
        count = len(fills)
        index = torch.from_numpy(np.concatenate((fills.first, fills.second))).to(self.pages.device)
        here = Fills(fills.slots, np.arange(count), count + np.arange(count), fills.offset, fills.shift)
        for layer, rotary in zip(self.pages.layers, self._rotary, strict=True):
            held = layer.index_select(0, index)
            keys, values = (
                held.index_select(1, elements).view(2 * count, *shape)
                for elements, shape in zip(self._elements, self._shapes, strict=True)
            )
            moved = moved_blocks(PagedKV([keys], [values]), here, [rotary])
            blocks = torch.empty_like(held[:count])
            for elements, side in zip(self._elements, (moved.keys[0], moved.values[0]), strict=True):
                blocks.index_copy_(1, elements, side.flatten(1))
            yield blocks
