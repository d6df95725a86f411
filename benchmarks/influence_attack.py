"""A victim that is served from an attacker's pages: how far its next-token distributions move, and how far they can."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from jointkv.core.blocks import block_errors
from jointkv.evaluate.holding.prefilled import prefill, take
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from jointkv.theory.drift import AttentionDrift, attention_drift

DRIFTS = ("logit_shift", "total_variation", "kl")
MOST_CHANGED = 4
"""Tokens of a prefix that one step of the search replaces at the most."""
State = dict[str, Tensor]
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Victim:
    """A request in three parts, as token ids.

    Attributes:
        prefix: what only the victim sent first; an attacker has as many tokens of his own.
        shared: text that both sent, in whole blocks.
        tail: true tokens that follow; the distribution after each of them is compared.
    """

    prefix: Prefix
    shared: Prefix
    tail: Prefix


@dataclass(frozen=True)
class Outcome:
    """What one attacker's pages did to the victim.

    Attributes:
        kl: KL(unfused || served) after each tail token, in nats.
        changed: share of them with another most likely token.
        blocks: blocks of the victim that were read from the attacker's pages.
        block_error, token_error: largest relative error among them, of blocks and of single tokens; 0 without any.
    """

    kl: tuple[float, ...]
    changed: float
    blocks: int
    block_error: float
    token_error: float

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)


class Target:
    """A victim of `model`, to be served from the pages of any attacker, under several policies.

    Args:
        policies: by the bound that names them.
    """

    def __init__(
        self, model: PreTrainedModel, victim: Victim, policies: dict[float, FusionPolicy], block_size: int = 16
    ) -> None:
        self.model, self.victim, self.block_size = model, victim, block_size
        self._inputs = record_attention(model, (*victim.prefix, *victim.shared, *victim.tail))
        self._pools = {bound: JointPool(model, policy, block_size=block_size) for bound, policy in policies.items()}
        (self.own,) = self.states([victim.prefix])
        unfused = JointPool(model, "off", block_size=block_size)
        self.reference = self._next_tokens(self._cache(unfused, self.own))

    def states(self, prefixes: Sequence[Prefix]) -> list[State]:
        """K and V of requests that send each of `prefixes` and then the shared text, on pages of their own."""
        # Prefill leaves the last token of a prompt to what comes after it.
        requests = [Request((*prefix, *self.victim.shared, self.victim.tail[0]), (), "") for prefix in prefixes]
        batch = prefill(self.model, requests, block_size=self.block_size)
        parts = [take(batch, [row]).state for row in range(len(requests))]
        for part, request in zip(parts, requests, strict=True):
            part["tokens"] = torch.tensor([request.prompt[:-1]])
        return parts

    def serve(self, attacker: State, bound: float) -> Outcome:
        """The victim's distributions when `attacker` was there first."""
        planted, cache = self._meet(attacker, bound)
        served = self._served(planted, cache)
        logits = self._next_tokens(cache)
        errors = self._errors(cache, *served)
        for each in (cache, planted):
            each.reset()
        log_p, log_q = self.reference.log_softmax(-1), logits.log_softmax(-1)
        divergence = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).clamp(min=0)
        changed = (log_p.argmax(-1) != log_q.argmax(-1)).double().mean()
        return Outcome(tuple(divergence.tolist()), float(changed), *errors)

    def drift(self, attacker: State, bound: float) -> list[AttentionDrift]:
        """Per layer the tail's attention rows: bounds from the errors made, and what happens, at equal queries."""
        planted, cache = self._meet(attacker, bound)
        served = self._served(planted, cache)
        found = []
        for layer, (query, key, value, scale) in enumerate(self._inputs):
            read = [self._as_read(cache, side, layer, states, *served) for side, states in enumerate((key, value))]
            repeats = query.shape[0] // key.shape[0]
            wide = [states.repeat_interleave(repeats, 0)[:, None] for states in (key, read[0], value, read[1])]
            tail, tokens = len(self.victim.tail), key.shape[1]
            mask = torch.arange(tokens) <= torch.arange(tokens - tail, tokens)[:, None]
            rows = query[:, -tail:]
            found.append(attention_drift(rows, *wide, scale, mask.expand(len(query), tail, tokens)))
        for each in (cache, planted):
            each.reset()
        return found

    def _meet(self, attacker: State, bound: float) -> tuple[JointCache, JointCache]:
        pool = self._pools[bound]
        return self._cache(pool, attacker), self._cache(pool, self.own)

    def _cache(self, pool: JointPool, state: State) -> JointCache:
        cache = JointCache(pool, "one tenant")
        cache.restore(len(self.victim.prefix) + len(self.victim.shared), state)
        return cache

    @torch.inference_mode()
    def _next_tokens(self, cache: JointCache) -> Tensor:
        """Logits after each tail token, float64 `[tail, vocabulary]`."""
        tail = torch.tensor([self.victim.tail])
        position = cache.length + torch.arange(tail.shape[1])[None]
        mask = torch.ones(1, cache.length + tail.shape[1], dtype=torch.long)
        output = self.model(input_ids=tail, position_ids=position, attention_mask=mask, past_key_values=cache)
        return output.logits[0].double()

    def _served(self, planted: JointCache, cache: JointCache) -> tuple[Tensor, Tensor]:
        """Slots of the victim's prompt that are read from the attacker's pages, and those pages."""
        pages = cache.tables[0].pages[0]
        slot = torch.isin(pages, planted.tables[0].pages[0]).nonzero().squeeze(1)
        return slot, pages[slot]

    def _errors(self, cache: JointCache, slot: Tensor, pages: Tensor) -> tuple[int, float, float]:
        """Blocks served, and the largest relative error of a block and of a token."""
        if not len(slot):
            return 0, 0.0, 0.0
        assert cache.pool.blocks is not None
        own_pages, worst = self.own["table.0"][0, slot], torch.zeros(2)
        for side, layers in (("key", cache.pool.blocks.kv.keys), ("value", cache.pool.blocks.kv.values)):
            own = torch.stack([self.own[f"{side}.{layer}"][own_pages].flatten(1) for layer in range(len(layers))])
            read = torch.stack([layer[pages].flatten(1) for layer in layers])
            errors = block_errors(own, read, self.block_size, cache.pool.policy.across_layers)
            worst = torch.maximum(worst, torch.stack([error.max() for error in errors]))
        return len(slot), *worst.tolist()

    def _as_read(self, cache: JointCache, side: int, layer: int, states: Tensor, slot: Tensor, pages: Tensor) -> Tensor:
        """`states [h, n, d]` of one layer with the served blocks as they are read."""
        assert cache.pool.blocks is not None
        kv = cache.pool.blocks.kv
        read = states.clone()
        tokens = (slot[:, None] * self.block_size + torch.arange(self.block_size)).flatten()
        read[:, tokens] = (kv.keys, kv.values)[side][layer][pages].flatten(0, 1).transpose(0, 1)
        return read


def search(
    score: Callable[[list[Prefix]], list[float]],
    start: Prefix,
    start_score: float,
    vocabulary: Sequence[int],
    generations: int,
    width: int,
    rng: random.Random,
) -> tuple[Prefix, list[float]]:
    """Greedy random coordinate search for the prefix with the largest score.

    Every generation replaces 1 to `MOST_CHANGED` random tokens of the best prefix by random ones, `width` times, and
    keeps the best of them if it is better. Costs `generations * width` scores.

    Returns:
        The best prefix, and the best score before the first and after every generation.
    """
    best, history = start, [start_score]
    for _ in range(generations):
        tried = []
        for _ in range(width):
            prefix = list(best)
            for place in rng.sample(range(len(prefix)), rng.randint(1, min(MOST_CHANGED, len(prefix)))):
                prefix[place] = rng.choice(vocabulary)
            tried.append(tuple(prefix))
        scores = score(tried)
        place = max(range(width), key=scores.__getitem__)
        if scores[place] > history[-1]:
            best = tried[place]
        history.append(max(history[-1], scores[place]))
    return best, history


def record_attention(model: PreTrainedModel, tokens: Prefix) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Per layer q, k and v as attention gets them, `[heads, n, d]`, and its scale, for one unfused request."""
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        seen.append((query[0], key[0], value[0], scale))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    before = model.config._attn_implementation
    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    model.set_attn_implementation("recorded")
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
    model.set_attn_implementation(before)
    return seen
