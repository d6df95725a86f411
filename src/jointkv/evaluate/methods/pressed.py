"""What the methods of `kvpress` (NVIDIA) have in common: a press drops tokens of each request at its prefill."""

from __future__ import annotations

import importlib
from typing import Any

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import layer_states, nbytes_of, prefill_dense
from jointkv.evaluate.holding.held import DenseBatch, HeldBatch
from jointkv.evaluate.methods.base import Method


class Pressed(Method):
    """A press of `kvpress`, which sees all but the last token of a prompt, the question included.

    Args:
        press: its class there.
    """

    levels = (0.75, 0.5, 0.25, 0.125)
    level_means = "share of tokens kept"
    allowed = "more than 0, at most 1"
    packages = ("kvpress",)

    def __init__(self, name: str, press: str, description: str) -> None:
        self.name, self.description, self._press = name, description, press

    def press(self, compression_ratio: float) -> Any:
        """The press that drops the share `compression_ratio` of the tokens."""
        return getattr(importlib.import_module("kvpress"), self._press)(compression_ratio)

    def allows(self, level: float) -> bool:
        return 0 < level <= 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        with self.press(1 - level)(batch.model):
            caches = [prefill_dense(batch.model, request) for request in batch.requests]
        return DenseBatch(batch, caches, sum(nbytes_of(layer_states(cache)) for cache in caches))

    def level_for_share(self, share: float) -> float | None:
        return share if 0 < share <= 1 else None


PRESSES = (
    # arXiv 2404.14469, 2510.00636, 2406.11430, 2401.06104, 2309.17453; all but TOVA keep other tokens in every head.
    Pressed("snapkv", "SnapKVPress", "tokens that the last 64 tokens of the prompt attend to (SnapKV)"),
    Pressed("expected_attention", "ExpectedAttentionPress", "tokens that future queries are expected to attend to"),
    Pressed("knorm", "KnormPress", "tokens whose keys have a small norm"),
    Pressed("tova", "TOVAPress", "tokens that the last token of the prompt attends to (TOVA)"),
    Pressed("streaming_llm", "StreamingLLMPress", "the first 4 tokens and the last ones (StreamingLLM)"),
)
