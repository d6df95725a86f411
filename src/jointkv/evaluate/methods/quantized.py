"""The `QuantizedCache` of transformers, each request on its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import prefill_dense
from jointkv.evaluate.holding.held import DenseBatch, HeldBatch
from jointkv.evaluate.methods.base import Method

BACKENDS = {8: "hqq", 4: "quanto", 2: "quanto"}
"""quanto offers this cache 4 and 2 bits only. hqq's packing of 4 and 2 bits needs groups in a multiple of 2 and 4."""


class Quantized(Method):
    """Asymmetric integer codes in groups of the channels of one token and head, as transformers does by default.

    KIVI (arXiv 2402.02750), to which its documentation refers, groups K by channel; `quantized_pages` does that.
    transformers quantises a whole prompt at once, so no residual window is held after a prefill.
    """

    name = "quantized"
    description = "QuantizedCache of transformers: packed codes, a scale and a zero per token and head"
    levels = (8.0, 4.0, 2.0)
    level_means = "bits"
    allowed = "8, 4, 2"
    packages = ("optimum-quanto", "hqq")

    def allows(self, level: float) -> bool:
        return level in BACKENDS

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        caches = [prefill_dense(batch.model, request, _cache(batch, int(level))) for request in batch.requests]
        held = [tensor for cache in caches for tensor in held_tensors(cache)]
        quantized = DenseBatch(batch, caches, sum(tensor.nbytes for tensor in held))
        quantized.nbytes_packed = sum(tensor.nbytes for tensor in held if not tensor.is_floating_point())
        return quantized


def _cache(batch: Batch, bits: int) -> Any:
    from transformers import QuantizedCache

    config = batch.model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    axis = 1 if BACKENDS[bits] == "hqq" else 0  # either backend's name for groups of consecutive numbers
    return QuantizedCache(
        BACKENDS[bits], batch.model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=size
    )


def held_tensors(cache: Any) -> list[Tensor]:
    """Every tensor that the layers of a `QuantizedCache` hold: codes, scales, zeros, the residual window."""
    found: list[Tensor] = []
    for layer in cache.layers:
        for held in (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values):
            found += _plain_tensors(held)
    return found


def _plain_tensors(held: Any) -> list[Tensor]:
    if isinstance(held, dict):
        held = tuple(held.values())
    if isinstance(held, tuple):
        return [tensor for part in held for tensor in _plain_tensors(part)]
    if not isinstance(held, Tensor):
        return []
    if hasattr(held, "__tensor_flatten__"):  # quanto's tensors are made of others
        names, _ = held.__tensor_flatten__()
        return [tensor for name in names for tensor in _plain_tensors(getattr(held, name))]
    return [held]
