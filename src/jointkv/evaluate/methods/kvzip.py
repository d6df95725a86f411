"""KVzip, arXiv 2505.23416."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import feed_each, prefill_dense
from jointkv.evaluate.holding.held import DenseBatch, HeldBatch
from jointkv.evaluate.methods.pressed import Pressed


class KVzip(Pressed):
    """Keeps the tokens, per layer and head, that the model attends to when it is asked to repeat the prompt.

    The press of `kvpress` masks what it drops instead of dropping it, so bytes are a calculation.
    """

    def __init__(self) -> None:
        description = "tokens needed to repeat the prompt (KVzip); kvpress masks the others, so bytes are predicted"
        super().__init__("kvzip", "KVzipPress", description)

    @torch.inference_mode()  # the press runs the model again after the prefill
    def compress(self, batch: Batch, level: float) -> HeldBatch:
        press, caches, masks = self.press(1 - level), [], []
        for request in batch.requests:
            with press(batch.model):
                press.prefix_length = 0  # it takes every prompt for one that begins with the chat template
                caches.append(prefill_dense(batch.model, request))
            masks.append([getattr(module, "masked_key_indices", None) for module in _attentions(batch.model)])
        _mask(batch.model, None)
        return MaskedBatch(batch, caches, masks)


class MaskedBatch(DenseBatch):
    """Dense caches, and per request and layer the (row, head, token) triples that attention must not see."""

    counted = "predicted"

    def __init__(self, batch: Batch, caches: list[Any], masks: list[list[Any]]) -> None:
        super().__init__(batch, caches, 0)
        self._masks = masks
        for cache, request in zip(caches, masks, strict=True):
            for layer, masked in zip(cache.layers, request, strict=True):
                dropped = 0 if masked is None else len(masked[0])
                per_token = layer.keys[0, 0, 0].nbytes + layer.values[0, 0, 0].nbytes
                self.nbytes += layer.keys.nbytes + layer.values.nbytes - dropped * per_token

    def feed(self, tokens: Tensor) -> Tensor:
        logits = []
        for cache, first, masks, row in zip(self._caches, self._positions, self._masks, tokens, strict=True):
            _mask(self.model, masks)
            # Token by token: kvpress masks with a key that no query attends to, and many queries leave room for none.
            steps = [feed_each(self.model, [cache], [first + i], row[None, i, None]) for i in range(len(row))]
            logits.append(torch.cat(steps, 1))
        _mask(self.model, None)
        self._positions = [position + tokens.shape[1] for position in self._positions]
        return torch.cat(logits)


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def _mask(model: Any, request: list[Any] | None) -> None:
    modules = _attentions(model)
    for module, masked in zip(modules, request or [None] * len(modules), strict=True):
        module.masked_key_indices = masked
