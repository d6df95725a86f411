"""Caches of transformers, one per request: prefill, feed, copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from jointkv.evaluate.traffic.base import Request

LayerStates = list[tuple[Tensor, Tensor]]
"""K and V `[1, h, n, d]` of one request, per layer."""


@torch.inference_mode()
def prefill_dense(model: PreTrainedModel, request: Request, cache: Any = None) -> Any:
    """The KV of all but the last prompt token of `request`, in `cache` if given, else in a new `DynamicCache`."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    ids = torch.tensor([request.prompt[:-1]], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def feed_each(model: PreTrainedModel, caches: Sequence[Any], positions: Sequence[int], tokens: Tensor) -> Tensor:
    """Feed row `i` of `tokens [requests, n]` to `caches[i]` from position `positions[i]` on; logits as `feed` gives.

    The position is given, not taken from the cache: a cache that dropped tokens is shorter than what it stands for.
    """
    logits = []
    for cache, first, row in zip(caches, positions, tokens, strict=True):
        place = torch.arange(first, first + len(row), device=model.device)
        out = model(
            input_ids=row[None].to(model.device), past_key_values=cache, use_cache=True, position_ids=place[None]
        )
        logits.append(out.logits)
    return torch.cat(logits)


def fork_cache(cache: Any) -> Any:
    """A copy of a growing cache of transformers; its layers replace their tensors and never write into them."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def layer_states(cache: Any) -> LayerStates:
    """K and V of each layer of a `DynamicCache`, not copied."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def dense_cache(model: PreTrainedModel, states: LayerStates) -> DynamicCache:
    """A `DynamicCache` that holds `states`."""
    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


def nbytes_of(states: LayerStates) -> int:
    """Bytes of K and V of all layers."""
    return sum(keys.nbytes + values.nbytes for keys, values in states)
