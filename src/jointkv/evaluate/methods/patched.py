"""What methods have in common that read what earlier prompts have computed, at any position."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.evaluate.methods.base import Method

if TYPE_CHECKING:
    from jointkv.evaluate.holding.patched import FoundText


class Patched(Method):
    """Base of methods that read what earlier prompts have computed, and compute some of it again.

    Attributes:
        whole_layers: at the bottom, in which every token is computed.
    """

    whole_layers = 0

    @abstractmethod
    def chosen(self, text: FoundText, level: float) -> Tensor:
        """Which of the tokens that were found are computed all the same, bool `[n]`."""

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        from jointkv.evaluate.holding.patched import PatchedBatch
        from jointkv.hf.rotary import rotary_of

        layers = batch.model.config.get_text_config(decoder=True).num_hidden_layers
        rotary = rotary_of(batch.model, range(layers))
        return PatchedBatch(batch, rotary, lambda text: self.chosen(text, level), self.whole_layers)
