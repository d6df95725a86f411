"""Ratios of all pairs of requests with one text: what is lost where one reads a page of the other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.core.packed import PackedPages
from jointkv.evaluate.holding.prefilled import Prefilled, join, prefill
from jointkv.evaluate.reuse.setup import UNIT, ReuseSettings, Sample
from jointkv.fusion.pair_sums import pair_errors, pair_sums
from jointkv.policy import FusionPolicy

Ratios = NDArray[np.float32]
"""`[requests, requests, blocks]`, entry `[d, t, j]`: block `j` of `t` read from the page of `d`, error over bound."""

REQUESTS_AT_ONCE = 4
PAIRS_AT_ONCE = 1024


def prefilled(model: PreTrainedModel, sample: Sample) -> Prefilled:
    """All requests of `sample`, on pages of `UNIT` tokens."""
    parts = [
        sample.requests[start : start + REQUESTS_AT_ONCE] for start in range(0, len(sample.requests), REQUESTS_AT_ONCE)
    ]
    return join([prefill(model, part, block_size=UNIT) for part in parts])


def pair_ratios(batch: Prefilled, settings: ReuseSettings) -> dict[int, Ratios]:
    """By block size, the ratios of the text's blocks; 0 where a request reads its own page."""
    own_blocks = batch.table[:, settings.header_tokens // UNIT :]
    count, units = own_blocks.shape
    first, second = torch.triu_indices(count, count, 1)
    found = {size: np.zeros((count, count, units * UNIT // size), np.float32) for size in settings.block_sizes}
    packed = packed_pages(batch)
    for part in torch.arange(len(first)).split(max(1, PAIRS_AT_ONCE // units)):
        one, other = first[part], second[part]
        sums = pair_sums(packed, own_blocks[one].flatten(), own_blocks[other].flatten())
        for size, ratios in found.items():
            for target, donor, order in ((one, other, [0, 1, 2]), (other, one, [0, 2, 1])):
                whole = block_ratios(sums[..., order], size // UNIT).view(len(part), -1)
                ratios[donor.numpy(), target.numpy()] = whole.numpy()
    return found


def block_ratios(sums: Tensor, units: int) -> Tensor:
    """Ratios of blocks of `units` consecutive blocks of `sums`, see `pair_sums`: error over the bound of `safe`."""
    policy = FusionPolicy.preset("safe")
    bounds = [policy.threshold(name, 0) for name in ("max_relative_error", "max_token_error")]
    assert bounds[0] is not None and bounds[1] is not None
    joined = sums.unflatten(0, (-1, units)).movedim(1, 3).flatten(3, 4)
    key, value, token = pair_errors(joined, "rms")
    return torch.maximum(torch.maximum(key, value) / bounds[0], token / bounds[1])


def packed_pages(batch: Prefilled) -> PackedPages:
    """K and V of all layers in the kernel's layout, K before V in every page."""
    shape = batch.state["key.0"].shape
    sizes = [batch.state[f"{side}.0"][0, 0].numel() for side in ("key", "value")]
    tokens = torch.arange(shape[1])
    token_of = torch.cat([tokens.repeat_interleave(size) for size in sizes])
    is_value = torch.arange(len(token_of)) >= shape[1] * sizes[0]
    layers = [
        torch.cat([batch.state[f"{side}.{layer}"].flatten(1) for side in ("key", "value")], 1)
        for layer in range(batch.layers)
    ]
    return PackedPages(layers, token_of, is_value)
