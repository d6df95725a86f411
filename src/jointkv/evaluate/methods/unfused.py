"""The model as it is: every other method is measured against this one."""

from __future__ import annotations

import copy

from torch import Tensor

from jointkv.evaluate.methods.base import Batch, HeldBatch, Method, feed_each


class DenseBatch(HeldBatch):
    """One dense cache per request; `nbytes` is the caller's."""

    counted = "tensors"

    def __init__(self, batch: Batch, caches: list, nbytes: int) -> None:
        self._model, self._caches, self.nbytes = batch.model, caches, nbytes
        self._positions = [len(request.prompt) - 1 for request in batch.requests]

    def feed(self, tokens: Tensor) -> Tensor:
        logits = feed_each(self._model, self._caches, self._positions, tokens)
        self._positions = [position + tokens.shape[1] for position in self._positions]
        return logits


class Unfused(Method):
    """Every request keeps all of its own KV."""

    name = "unfused"
    description = "every request keeps all of its own KV"
    levels = (1.0,)
    level_means = "share of tokens kept"

    def hold(self, batch: Batch, level: float) -> HeldBatch:
        return DenseBatch(batch, copy.deepcopy(batch.dense), batch.unfused_nbytes)
