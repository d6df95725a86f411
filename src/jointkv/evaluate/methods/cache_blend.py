"""Tokens whose V is farthest from its own after the first layers are computed again: CacheBlend (arXiv 2405.16444)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jointkv.evaluate.methods.patched import Patched

if TYPE_CHECKING:
    from jointkv.evaluate.holding.patched import FoundText

LAYERS = 2
"""At the bottom, in which all tokens are computed; the V of the last of them decides."""


class CacheBlend(Patched):
    """A share of the tokens that were found is computed in all layers: those whose V deviates most in the second.

    There, chunks were computed each on its own, and from layer to layer somewhat fewer tokens are computed; here one
    choice holds for all the layers above, of as many tokens.
    """

    name = "cache_blend"
    description = "as full_reuse, but the tokens that deviate most in layer 2 are computed (like CacheBlend)"
    levels = (0.3, 0.15, 0.05)
    level_means = "share of the found tokens that is computed (there: 0.15)"
    allowed = "0 to 1"
    whole_layers = LAYERS

    def allows(self, level: float) -> bool:
        return 0 <= level <= 1

    def chosen(self, text: FoundText, level: float) -> Tensor:
        found = text.found
        layer = min(LAYERS, len(text.exact)) - 1
        apart = (text.exact[layer][1] - text.states[layer][1]).float().square().sum((0, 1, 3)).masked_fill(~found, -1)
        chosen = torch.zeros_like(found)
        chosen[apart.topk(round(level * int(found.sum()))).indices] = True
        return chosen
