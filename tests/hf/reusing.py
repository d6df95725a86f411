"""Pools that reuse, prompts with text in common, and what a model must say when it reads a donor's K and V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill_result import PrefillResult
from jointkv.hf.reuse import ReuseMode, ReuseOptions
from jointkv.policy import FusionPolicy
from jointkv.policy.reuse import ReuseRule
from tests.hf.tiny_models import BLOCK, VOCABULARY, build_model

NEVER, ALWAYS = 1e-12, 1 - 1e-12
"""Audit rates."""

ANYTHING = FusionPolicy(max_relative_error=1e6, max_token_error=1e6)
"""Bounds that random models, which forget nothing, stay within."""

BY_ENTRY = ReuseRule(near=1.0, echoes=False)
"""Random text echoes itself everywhere; here the entry block decides where there is no witness."""


def reusing(
    name: str = "llama",
    policy: FusionPolicy = ANYTHING,
    mode: ReuseMode = "probed",
    audit_rate: float = NEVER,
    rule: ReuseRule | None = None,
    max_pages: int | None = None,
    attention: str = "sdpa",
    fuses: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, JointPool]:
    """A fresh model and a pool that reuses; unless asked for, it neither fuses what was computed nor audits."""
    model = build_model(name, attention=attention)
    chosen = ReuseOptions(mode, audit_rate=audit_rate, rule=rule or BY_ENTRY, seed=0, **options)
    pool = JointPool(model, policy, block_size=BLOCK, max_pages=max_pages, reuse=chosen)
    if not fuses:
        dense(model, text(1, 0), JointCache(pool))
        for fuser in pool.fusers.values():
            fuser.close()
        pool.fusers = {}
    return model, pool


def text(length: int, seed: int) -> Tensor:
    """Random token ids `[length]`."""
    return torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def near(shared: Tensor, seed: int, header: int = BLOCK, tail: int = 3) -> Tensor:
    """`shared` between a header and a tail of its own."""
    return torch.cat((text(header, 1000 + seed), shared, text(tail, 2000 + seed)))


def padded(*prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the left."""
    width = max(map(len, prompts))
    rows = [torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]
    mask = [torch.arange(width) >= width - len(prompt) for prompt in prompts]
    return torch.stack(rows), torch.stack(mask).long()


def prefill(
    pool: JointPool, model: PreTrainedModel, *prompts: Tensor, key: Any = ""
) -> tuple[JointCache, PrefillResult]:
    """A new cache of `prompts`, whose integrity is checked."""
    cache = JointCache(pool, key)
    result = cache.prefill(model, *padded(*prompts))
    cache.check_integrity()
    return cache, result


@torch.no_grad()
def dense(model: PreTrainedModel, prompt: Tensor, cache: Any = None) -> Any:
    """All of `prompt` in `cache`, by default transformers' own."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(input_ids=prompt[None], past_key_values=cache)
    return cache


@torch.no_grad()
def with_donor(model: PreTrainedModel, prompt: Tensor, slots: tuple[int, ...], donor: DynamicCache) -> DynamicCache:
    """All but the last token of `prompt`, computed behind blocks `slots` that hold the donor's K and V."""
    cache, size = DynamicCache(config=model.config), BLOCK
    end = len(prompt) - 1
    at = 0
    for slot in (*slots, None):
        until = end if slot is None else slot * size
        if until > at:
            model(input_ids=prompt[None, at:until], past_key_values=cache)
            at = until
        if slot is not None:
            for index, layer in enumerate(donor.layers):
                part = slice(at, at + size)
                cache.update(layer.keys[:, :, part], layer.values[:, :, part], index)
            at += size
    return cache


@torch.no_grad()
def next_logits(model: PreTrainedModel, cache: Any, prompt: Tensor) -> Tensor:
    """The logits behind the last token of `prompt`, which `cache` lacks."""
    return model(input_ids=prompt[None, -1:], past_key_values=cache).logits[0, -1]
