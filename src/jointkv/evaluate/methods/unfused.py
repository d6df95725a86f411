"""The model as it is: every other method is measured against this one."""

from __future__ import annotations

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import fork_cache, layer_states, nbytes_of
from jointkv.evaluate.holding.held import DenseBatch, HeldBatch
from jointkv.evaluate.methods.base import Method


class Unfused(Method):
    """Every request keeps all of its own KV."""

    name = "unfused"
    description = "every request keeps all of its own KV"
    levels = (1.0,)
    level_means = "share of tokens kept"
    allowed = "1"

    def allows(self, level: float) -> bool:
        return level == 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        caches = [fork_cache(cache) for cache in batch.dense]
        return DenseBatch(batch, caches, sum(nbytes_of(layer_states(cache)) for cache in caches))
