"""Text that stands in earlier prompts is read as it stands there, its keys turned, and nothing of it is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jointkv.evaluate.methods.patched import Patched

if TYPE_CHECKING:
    from jointkv.evaluate.holding.patched import FoundText


class FullReuse(Patched):
    """The least that can be computed: what stands in no earlier prompt."""

    name = "full_reuse"
    description = "text of earlier prompts is read at any position, keys turned, and none of it computed again"
    levels = (1.0,)
    level_means = "nothing to set"
    allowed = "1"

    def allows(self, level: float) -> bool:
        return level == 1

    def chosen(self, text: FoundText, level: float) -> Tensor:
        return torch.zeros_like(text.found)
