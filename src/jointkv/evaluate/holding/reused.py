"""A batch whose prompts read each other's pages before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from jointkv.core.blocks import PagedKV, block_errors
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.fused import FusedBatch
from jointkv.evaluate.holding.prefilled import left_padded
from jointkv.evaluate.holding.work import Work, all_computed, prefill_flops
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill_result import RowPrefill
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from jointkv.policy.rule import Rule


class ReusedBatch(FusedBatch):
    """Prompts prefilled one after another by `JointCache.prefill` on a pool of their own.

    Attributes:
        done: what was computed, and what was read instead.
        pages_before: pages that as many tokens take without any sharing.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        policy: FusionPolicy,
        options: ReuseOptions,
        block_size: int = 16,
    ) -> None:
        self.model = model
        self.cache = JointCache(JointPool(model, policy, block_size=block_size, reuse=options))
        ids, mask = left_padded([request.prompt for request in requests], pad=model.config.pad_token_id or 0)
        self.done = self.cache.prefill(model, ids, mask)
        self._mask = mask[:, : self.cache.length]
        if not self.cache.length:  # nothing may be reused at a bound of 0
            self.feed(ids[:, :-1], mask[:, :-1])
        self._measure()
        self.pages_before = self.cache.references


def work_of(batch: Batch, held: ReusedBatch) -> Work:
    """What the prefill of `held` computed, and how much of what it read is beyond the bounds from that of `batch`."""
    cache, done = held.cache, held.done
    size, lengths = batch.block_size, batch.lengths
    computed = all_computed(lengths)
    missed = 0
    for row, (found, positions) in enumerate(zip(done.rows, computed, strict=True)):
        slots = torch.tensor(found.reused, dtype=torch.long)
        positions[: found.exact] = False
        positions[(slots[:, None] * size + torch.arange(size)).flatten()] = False
        missed += _missed(batch.dense[row], cache, row, found)
    return Work(
        tokens=done.tokens,
        exact_tokens=done.exact,
        skipped_tokens=done.skipped,
        flops=prefill_flops(batch.model, computed),
        flops_unfused=prefill_flops(batch.model, all_computed(lengths)),
        reused_blocks=sum(len(found.reused) for found in done.rows),
        missed_blocks=missed,
    )


def _missed(dense: Any, cache: JointCache, row: int, found: RowPrefill) -> int:
    """How many reused blocks of a row are beyond the bounds from the same blocks of an exact prefill, `dense`."""
    if not found.reused:
        return 0
    assert cache.pool.blocks is not None
    slots = torch.tensor(found.reused)
    pages = cache.tables[0].pages[row, slots]
    layers = [dense.layers[layer] for layer in cache.pool.full_layers]
    ratio = ratios(layers, slots, cache.pool.blocks.kv, pages, cache.pool.policy.rule(0))
    return int((ratio > 1).sum())


def ratios(layers: Sequence[Any], slots: Tensor, kv: PagedKV, pages: Tensor, rule: Rule) -> Tensor:
    """How far `pages [n]` are from the blocks `slots [n]` of a request: error over bound, `[n]`.

    Args:
        layers: of a dense cache of that request alone, those that attend to all tokens.
    """
    sides = []
    for side, read in zip(("keys", "values"), kv.vectors(pages), strict=True):
        own = torch.stack([_blocks(getattr(layer, side), kv.block_size)[slots].flatten(1) for layer in layers])
        sides.append(block_errors(own.float(), read, kv.block_size, rule.across_layers))
    (key, key_token), (value, value_token) = sides
    return torch.from_numpy(rule.ratio([key.numpy(), value.numpy(), torch.maximum(key_token, value_token).numpy()]))


def _blocks(states: Tensor, size: int) -> Tensor:
    """`[1, h, n, d]` as `[ceil(n / t), t, h, d]`."""
    tokens = states[0].transpose(0, 1)
    return pad(tokens, (0, 0, 0, 0, 0, -len(tokens) % size)).unflatten(0, (-1, size))
