"""Blocks of a prompt whose text is resident at another position: what they would hold, before any page does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jointkv.attention.rotary import Rotary, moved_blocks
from jointkv.core.blocks import LayerAggregate, PagedKV, ServedErrors, served_errors
from jointkv.core.moved_text import MovedText
from jointkv.core.reuse import Integers


@dataclass(frozen=True, eq=False)
class MovedBlocks:
    """What pages that are not written yet will hold.

    Attributes:
        text: which of them there are.
        kv: resident pages.
        rotary: of each layer.
    """

    text: MovedText
    kv: PagedKV
    rotary: Sequence[Rotary]

    def of(self, pages: Integers) -> PagedKV:
        """Of `pages [n]`."""
        return moved_blocks(self.kv, self.text.fills_of(pages), self.rotary)

    def errors(self, own: torch.Tensor, pages: Integers, aggregate: LayerAggregate) -> ServedErrors:
        """As `served_errors`, if the blocks in the pages `own [n]` were read from `pages [n]`."""
        would = self.of(pages)
        joined = PagedKV(
            *(
                [torch.cat((layer[own], other)) for layer, other in zip(layers, others, strict=True)]
                for layers, others in ((self.kv.keys, would.keys), (self.kv.values, would.values))
            )
        )
        return served_errors(joined, torch.arange(len(pages)), len(pages) + torch.arange(len(pages)), aggregate)
