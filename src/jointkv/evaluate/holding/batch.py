"""Requests on a model, with their unfused prefill in the forms that methods start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from jointkv.errors import UnsupportedModel
from jointkv.evaluate.holding.dense import prefill_dense
from jointkv.evaluate.traffic.base import Request

if TYPE_CHECKING:
    from jointkv.evaluate.holding.prefilled import Prefilled


@dataclass
class Batch:
    """Requests on a model, with their unfused prefill in the forms that methods start from; each made on first use.

    A prefill covers all but the last prompt token: that one and the continuation are fed to what a method holds.
    Nobody may change what `prefilled` and `dense` return. Methods refuse a model with layers that do not attend to all
    tokens, see `check_full_attention`.
    """

    model: PreTrainedModel
    requests: Sequence[Request]
    block_size: int = 16

    @cached_property
    def prefilled(self) -> Prefilled:
        """The batch on jointkv's pages."""
        # Needs a newer transformers than the environment of the baselines has.
        from jointkv.evaluate.holding.prefilled import from_dense, prefill

        try:
            check_full_attention(self.model)
        except UnsupportedModel:
            return prefill(self.model, self.requests, block_size=self.block_size)
        return from_dense(self.model, self.requests, self.dense, self.block_size)

    @cached_property
    def dense(self) -> list[DynamicCache]:
        """One `DynamicCache` per request."""
        return [prefill_dense(self.model, request) for request in self.requests]

    def release(self) -> None:
        """Drop the prefills, for memory; they are made again when they are asked for."""
        for name in ("prefilled", "dense"):
            self.__dict__.pop(name, None)

    @property
    def lengths(self) -> list[int]:
        """Prefilled tokens per request."""
        return [len(request.prompt) - 1 for request in self.requests]

    @property
    def unfused_nbytes(self) -> int:
        """Bytes of K and V of all prefilled tokens, at the model's dtype and without any rounding to blocks."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        return per_token * sum(self.lengths)


def check_full_attention(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModel` unless every layer caches all tokens: bytes would be counted wrongly otherwise."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    other = next((layer for layer in layers if type(layer) is not DynamicLayer), None)
    if other is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} has layers with a {type(other).__name__}; methods are compared on models whose "
            "layers all attend to all tokens"
        )


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that the model can attend to, if its config says."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
