"""The first tokens of every piece of text are computed again: what EPIC (arXiv 2410.15332) does with chunks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jointkv.evaluate.methods.patched import Patched

if TYPE_CHECKING:
    from jointkv.evaluate.holding.patched import FoundText


class Epic(Patched):
    """The first tokens of each run are computed, and the rest is read.

    There, chunks are marked by the user and were computed each on its own; here runs are found, and were computed
    behind the text of another prompt.
    """

    name = "epic"
    description = "as full_reuse, but the first tokens of every run are computed (like EPIC)"
    levels = (64.0, 32.0, 16.0, 8.0)
    level_means = "tokens computed at the head of every run"
    allowed = "a finite number from 0"

    def allows(self, level: float) -> bool:
        return 0 <= level < math.inf

    def chosen(self, text: FoundText, level: float) -> Tensor:
        chosen = torch.zeros_like(text.found)
        for run in text.runs:
            chosen[run.first : min(run.first + int(level), run.end)] = True
        return chosen
