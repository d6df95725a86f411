"""What the methods of `kvpress` (NVIDIA) have in common: a press drops tokens of each request at its prefill."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import layer_states, nbytes_of, prefill_dense
from jointkv.evaluate.holding.held import DenseBatch, HeldBatch
from jointkv.evaluate.methods.base import Method


class Pressed(Method):
    """One press per file. The press sees all but the last token of a prompt, the question included."""

    levels = (0.75, 0.5, 0.25, 0.125)
    level_means = "share of tokens kept"
    allowed = "more than 0, at most 1"
    packages = ("kvpress",)

    @abstractmethod
    def press(self, compression_ratio: float) -> Any:
        """The press of `kvpress` that drops the share `compression_ratio` of the tokens."""

    def allows(self, level: float) -> bool:
        return 0 < level <= 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        with self.press(1 - level)(batch.model):
            caches = [prefill_dense(batch.model, request) for request in batch.requests]
        return DenseBatch(batch, caches, sum(nbytes_of(layer_states(cache)) for cache in caches))

    def level_for_share(self, share: float) -> float | None:
        return share if 0 < share <= 1 else None
